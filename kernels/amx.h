// The inner loops for many rows on the matrix units (AMX): 32 rows times a pair of panels, over all inputs.
//
// One instruction multiplies a tile of 16 rows x 64 bytes with a tile of 16 lines of a panel and adds to 16 x 16 sums.
// Lines of int8 and bf16 panels are such tiles as they lie in memory; int4 is expanded to int8 first, and int8 to bf16
// where activations are floating point, one pair of panels at a time, for all rows. Rows of activations are cut into
// tiles beforehand, 1 kB each: loading one from 16 places of a matrix takes more than twice as long.
#pragma once

#include "blocks.h"

#if defined(__x86_64__) && defined(__linux__) && __has_include(<amxtileintrin.h>)  // GCC 11, Clang 12 and newer
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#define HAVE_AMX 1
#define TARGET_AMX __attribute__((target("amx-tile,amx-int8,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")))

namespace {

// Whether the CPU has AMX and the kernel grants it: each process must ask for its registers once.
inline bool has_amx() {
  unsigned a, b, c, d;
  if (!has_avx512() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool bf16 = d >> 22 & 1, tile = d >> 24 & 1, int8 = d >> 25 & 1;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return bf16 && tile && int8 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// All eight tiles 16 rows of 64 bytes: palette 1; from byte 16 on two bytes a tile with its bytes a row, from byte 48 on one
// with its rows. Constant data: GCC does not know that the instruction reads it all, and would drop stores to it.
alignas(64) constexpr uint8_t kTileConfig[64] = {
    1,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0,
    0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 16, 16, 16, 16, 16, 16, 16, 16};
TARGET_AMX void set_up_tiles() { _tile_loadconfig(kTileConfig); }
TARGET_AMX void give_tiles_back() { _tile_release(); }

// 16 rows times one panel. Integer sums leave the tile after each group, to be scaled in float32 while the tiles work on
// the next group: a vector load waits for the tile's store before it.
TARGET_AMX inline void int8_tile(const Block& b, int panel, int first_row) {
  const int64_t steps = b.row_bytes / 64, groups = ceil_div(b.k, b.group), lines = ceil_div(std::min(b.group, b.k), 64);
  const char *x = b.x + first_row * b.row_bytes, *w = b.w[panel];
  const float *x_scale = b.x_scale + first_row * groups, *x_sum = b.x_sum + first_row * groups;
  alignas(64) int32_t sums[2][16 * kChannels];
  __m512 out[16] = {};
  for (int64_t ahead = 0, s = 0; ahead <= groups; ++ahead) {
    if (ahead < groups) {
      _tile_zero(0);
      for (const int64_t end = std::min(s + lines, steps); s < end; ++s) {
        fetch_next(b, (2 * panel + first_row / 16) * steps + s);
        _tile_loadd(1, x + s * 1024, 64);
        _tile_loadd(2, w + s * 1024, 64);
        _tile_dpbssd(0, 1, 2);
      }
      _tile_stored(0, sums[ahead % 2], 64);
    }
    if (ahead == 0) continue;
    const int64_t g = ahead - 1;
    const __m512 w_scale = sixteen_bf16(b.w_scale[panel] + g * kChannels);
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) {
      const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(x_scale[r * groups + g]), w_scale);
      out[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums[g % 2] + r * kChannels)), scale, out[r]);
    }
    if (b.w_min[panel] == nullptr) continue;
    const __m512 w_min = sixteen_bf16(b.w_min[panel] + g * kChannels);
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r)
      out[r] = _mm512_fmadd_ps(_mm512_set1_ps(x_scale[r * groups + g] * x_sum[r * groups + g]), w_min, out[r]);
  }
  for (int r = 0; r < 16; ++r)
    _mm512_storeu_ps(b.out + (first_row + r) * kPair * kChannels + panel * kChannels, out[r]);
}

TARGET_AMX void int8_block_amx(const Block& b) {
  for (int panel = 0; panel < b.panels; ++panel)
    for (int row = 0; row < kMaxBlockRows; row += 16) int8_tile(b, panel, row);
}

// 2 x 2 tiles of sums: each tile of x and of w that is loaded is used twice.
TARGET_AMX void bf16_block_amx(const Block& b) {
  const int64_t steps = b.row_bytes / 64;
  const char *x0 = b.x, *x1 = b.x + steps * 1024, *w0 = b.w[0], *w1 = b.w[b.panels - 1];
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t s = 0; s < steps; ++s) {
    fetch_next(b, s);
    _tile_loadd(4, x0 + s * 1024, 64);
    _tile_loadd(6, w0 + s * 1024, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, x1 + s * 1024, 64);
    _tile_dpbf16ps(1, 5, 6);
    _tile_loadd(7, w1 + s * 1024, 64);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  constexpr int kStride = kPair * kChannels;
  _tile_stored(0, b.out, kStride * 4);
  _tile_stored(1, b.out + 16 * kStride, kStride * 4);
  _tile_stored(2, b.out + kChannels, kStride * 4);
  _tile_stored(3, b.out + 16 * kStride + kChannels, kStride * 4);
  for (int panel = 0; panel < b.panels && b.w_scale[panel]; ++panel) {
    const __m512 scale = sixteen_bf16(b.w_scale[panel]);
    for (int r = 0; r < kMaxBlockRows; ++r) {
      float* at = b.out + r * kStride + panel * kChannels;
      _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_loadu_ps(at), scale));
    }
  }
}

}  // namespace
#endif
