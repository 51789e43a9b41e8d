// The inner loops for many rows in vector registers, on CPUs with AVX512 but without matrix units, and where groups fill no tiles.
//
// Each line of a panel and each broadcast of a row is used several times: 6 rows x 2 panels of integer sums leave registers for
// the float32 sums over groups, 8 x 2 sums of bfloat16 products hide their latency. Measured on Zen 4, where one product a
// cycle is the peak: 85 % of it for int8 in groups of 64 (two more instructions a group and sum), 95 % with one scale, 97 % for
// bfloat16. Sums that leave the registers, or one panel at a time, reach 60-80 %.
#pragma once

#include "blocks.h"

#if defined(__x86_64__)
#define TARGET_AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma")))

namespace {

constexpr int kVectorBlockRows = 24;  // of one call: as often 6 as 8
constexpr int kFetchSteps = 16;       // lines of a panel between two fetches

inline bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// Weights are unsigned (expand_unsigned): `start` takes back what that added. int4 codes are unsigned anyway and start at 0.
template <int R>
TARGET_AVX512 NO_PRE void int8_rows_avx512(const Block& b, int row) {
  const int64_t steps = ceil_div(b.k, 4), group_steps = ceil_div(b.group, 4), groups = ceil_div(b.k, b.group);
  const char *x = b.x + row * b.row_bytes, *w0 = b.w[0], *w1 = b.w[b.panels - 1];
  const float *x_scale = b.x_scale + row * groups, *x_sum = b.x_sum + row * groups;
  const int32_t* start = b.start + row * groups;
  __m512 out[kPair][R] = {};
  for (int64_t g = 0, s = 0; g < groups; ++g) {
    __m512i sum[kPair][R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sum[0][r] = sum[1][r] = _mm512_set1_epi32(start[r * groups + g]);
    for (const int64_t end = std::min(s + group_steps, steps); s < end; ++s) {
      if (row == 0 && s % kFetchSteps == 0) fetch_next(b, s / kFetchSteps);
      const __m512i a = _mm512_loadu_si512(w0 + s * 64), c = _mm512_loadu_si512(w1 + s * 64);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        int32_t four;
        std::memcpy(&four, x + r * b.row_bytes + s * 4, 4);
        const __m512i v = _mm512_set1_epi32(four);
        sum[0][r] = _mm512_dpbusd_epi32(sum[0][r], a, v);
        sum[1][r] = _mm512_dpbusd_epi32(sum[1][r], c, v);
      }
    }
#pragma GCC unroll 2
    for (int p = 0; p < kPair; ++p) {
      const int panel = p < b.panels ? p : 0;
      const __m512 w_scale = sixteen_bf16(b.w_scale[panel] + g * kChannels);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(x_scale[r * groups + g]), w_scale);
        out[p][r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[p][r]), scale, out[p][r]);
      }
      if (b.w_min[panel] == nullptr) continue;
      const __m512 w_min = sixteen_bf16(b.w_min[panel] + g * kChannels);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
        out[p][r] = _mm512_fmadd_ps(_mm512_set1_ps(x_scale[r * groups + g] * x_sum[r * groups + g]), w_min, out[p][r]);
    }
  }
  for (int p = 0; p < kPair; ++p)
    for (int r = 0; r < R; ++r) _mm512_storeu_ps(b.out + ((row + r) * kPair + p) * kChannels, out[p][r]);
}

template <int R>
TARGET_AVX512_BF16 NO_PRE void bf16_rows_avx512(const Block& b, int row) {
  const char *x = b.x + row * b.row_bytes, *w0 = b.w[0], *w1 = b.w[b.panels - 1];
  __m512 sum[kPair][R] = {};
  for (int64_t s = 0; s < ceil_div(b.k, 2); ++s) {
    if (row == 0 && s % kFetchSteps == 0) fetch_next(b, s / kFetchSteps);
    const auto a = (__m512bh)_mm512_loadu_si512(w0 + s * 64), c = (__m512bh)_mm512_loadu_si512(w1 + s * 64);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int32_t two;
      std::memcpy(&two, x + r * b.row_bytes + s * 4, 4);
      const auto v = (__m512bh)_mm512_set1_epi32(two);
      sum[0][r] = _mm512_dpbf16_ps(sum[0][r], a, v);
      sum[1][r] = _mm512_dpbf16_ps(sum[1][r], c, v);
    }
  }
  for (int p = 0; p < kPair; ++p) {
    const uint16_t* scale = p < b.panels ? b.w_scale[p] : nullptr;
    const __m512 factor = scale ? sixteen_bf16(scale) : _mm512_set1_ps(1.f);
    for (int r = 0; r < R; ++r) _mm512_storeu_ps(b.out + ((row + r) * kPair + p) * kChannels, _mm512_mul_ps(sum[p][r], factor));
  }
}

void int8_block_avx512(const Block& b) {
  using Fn = void (*)(const Block&, int);
  constexpr Fn kFns[] = {int8_rows_avx512<1>, int8_rows_avx512<2>, int8_rows_avx512<3>,
                         int8_rows_avx512<4>, int8_rows_avx512<5>, int8_rows_avx512<6>};
  for (int row = 0; row < b.rows; row += 6) kFns[std::min(6, b.rows - row) - 1](b, row);
}

void bf16_block_avx512(const Block& b) {
  using Fn = void (*)(const Block&, int);
  constexpr Fn kFns[] = {bf16_rows_avx512<1>, bf16_rows_avx512<2>, bf16_rows_avx512<3>, bf16_rows_avx512<4>,
                         bf16_rows_avx512<5>, bf16_rows_avx512<6>, bf16_rows_avx512<7>, bf16_rows_avx512<8>};
  for (int row = 0; row < b.rows; row += 8) kFns[std::min(8, b.rows - row) - 1](b, row);
}

}  // namespace
#endif
