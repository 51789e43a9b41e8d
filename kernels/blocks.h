// What the inner loops for many rows (amx.h, many_avx512.h) are called with, and how weights are made ready for them.
//
// A pair of panels is expanded once, for all rows, to what the multiplying instruction takes: int4 to int8, int8 to unsigned
// bytes or to bfloat16. While one pair is multiplied the next one is fetched from memory.
#pragma once

#include "tiles_avx512.h"

#if defined(__x86_64__)
namespace {

constexpr int kMaxBlockRows = 32;
constexpr int kPair = 2;  // panels

// One call: some rows times one or two panels, over all inputs.
struct Block {
  const char* x;         // int8 or bfloat16, zero padded: rows, or tiles [2, steps, 16, 64 bytes] with zero rows (AMX)
  int64_t row_bytes;     // from row to row; 64 bytes for each tile along K
  int rows;
  const char* w[kPair];  // panels
  int panels;            // how many of them there are
  int64_t k, group;      // as in Tile; bfloat16 has one group
  const float* x_scale;  // [rows, groups], int8 only
  const float* x_sum;    // [rows, groups]
  const int32_t* start;  // [rows, groups]: what the sums of int8 products begin with, vectors only
  const uint16_t* w_scale[kPair];  // bfloat16 [groups, kChannels] or null; sums of bfloat16 products have one group
  const uint16_t* w_min[kPair];    // [groups, kChannels] or null
  float* out;            // [kMaxBlockRows, kPair * kChannels], overwritten
  const char* next;      // what the next pair's turn will read, a part of it for each call
  int64_t next_lines;    // lines of it to fetch at each tile along K (AMX), or every 64 bytes of a row (vectors)
};
using BlockFn = void (*)(const Block&);

inline void fetch_next(const Block& b, int64_t step) {
  for (int64_t i = 0; i < b.next_lines; ++i) __builtin_prefetch(b.next + (step * b.next_lines + i) * 64, 0, 2);
}

// int8 lines with 128 added to each weight: what vpdpbusd takes.
TARGET_AVX512 void expand_unsigned(const void* from, int64_t lines, char* to) {
  for (int64_t s = 0; s < lines; ++s)
    _mm512_storeu_si512(to + s * 64, _mm512_xor_si512(line_at(from, s), _mm512_set1_epi8(-128)));
}

// int4 lines of 8 inputs -> int8 lines of 4: twice as many.
TARGET_AVX512 void expand_int4(const void* from, int64_t lines, char* to) {
  const __m512i low_bits = _mm512_set1_epi8(15);
  for (int64_t s = 0; s < lines; ++s) {
    const __m512i line = line_at(from, s);
    _mm512_storeu_si512(to + s * 128, _mm512_and_si512(line, low_bits));
    _mm512_storeu_si512(to + s * 128 + 64, _mm512_and_si512(_mm512_srli_epi16(line, 4), low_bits));
  }
}

TARGET_AVX512 inline __m512i bf16_bits(__m512 v) {  // round to nearest, ties to even; NaN only as of a bf16 scale
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
}

// int8 lines of 4 inputs -> bfloat16 lines of 2. One scale a channel is applied to the sums; scales per group go into the
// weights here (`scale` [groups, kChannels], else null; zeros that pad K take the last one). Integers up to 127 are exact in
// bfloat16.
TARGET_AVX512 void expand_bf16(
    const void* from, int64_t lines, const uint16_t* scale, int64_t group, int64_t groups, char* to) {
  for (int64_t s = 0; s < lines; ++s) {
    const __m512i line = line_at(from, s);
    const __m512 factor = scale ? sixteen_bf16(scale + std::min(s * 4 / group, groups - 1) * kChannels) : _mm512_set1_ps(1.f);
    __m512i half[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const __m512 w = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(line, 24 - 8 * k), 24));
      half[k] = bf16_bits(_mm512_mul_ps(w, factor));
    }
    _mm512_storeu_si512(to + s * 128, _mm512_or_si512(half[0], _mm512_slli_epi32(half[1], 16)));
    _mm512_storeu_si512(to + s * 128 + 64, _mm512_or_si512(half[2], _mm512_slli_epi32(half[3], 16)));
  }
}

// float32 -> bfloat16, ties to even. What is not finite stays so: its rounding must not carry into the sign.
TARGET_AVX512 void round_row(const float* from, int64_t k, uint16_t* to) {
  for (int64_t i = 0; i < k; ++i) {
    uint32_t bits;
    std::memcpy(&bits, from + i, 4);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    to[i] = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
  }
}

// Row `r` of [rows, steps * 64 bytes] to where the tiles want it.
inline void cut_row(const char* row, int64_t r, int64_t steps, char* tiles) {
  char* to = tiles + r / 16 * steps * 1024 + r % 16 * 64;
  for (int64_t s = 0; s < steps; ++s) std::memcpy(to + s * 1024, row + s * 64, 64);
}

}  // namespace
#endif
