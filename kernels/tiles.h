// The inner loops for few rows: up to `kMaxRows` rows times a panel of 16 output channels, over all inputs.
//
// They exist for AVX2 and in portable C++ here, for AVX512-VNNI in tiles_avx512.h, and are chosen at run time: a library
// built on one machine may be loaded by another CPU of the same family.
//
// A panel holds 16 output channels, zero padded to a multiple of 64 inputs. Its 64-byte lines are 16 channels times
//   int8  4 consecutive inputs, int8
//   int4  8 consecutive inputs: byte j of a channel has input j in its low and input j + 4 in its high four bits
//   bf16  2 consecutive inputs, bfloat16
// Seen as sixteen 32-bit lanes each lane is one channel, so sums never cross lanes. A line of int8 or bf16 is also one
// row of the second operand of the AMX instructions (amx.h).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "vector.h"

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#define NO_PRE
#else  // GCC's partial redundancy elimination carries loads into the next turn and pushes sums out of registers
#define NO_PRE __attribute__((optimize("no-tree-pre")))
#endif
// Ends one row's sums before the next row's begin. GCC would mix them, run out of AVX2's 16 registers and keep sums in memory,
// at half the speed.
#define ROW_IS_DONE(a, b) asm("" : "+x"(a), "+x"(b))
#endif

namespace {

constexpr int kChannels = 16;  // output channels in a panel
constexpr int kMaxRows = 8;    // of any variant

// One call of an inner loop: some rows times one panel, over all of K.
struct Tile {
  const void* x;         // first row: int8 activations as the variant wants them, else float32; zero padded
  int64_t x_stride;      // elements from row to row
  const void* w;         // the panel
  int64_t k;             // inputs
  int64_t group;         // inputs per scale
  const float* x_scale;  // [rows, groups], int8 activations only
  const float* x_sum;    // [rows, groups]: sums of the quantised inputs, exact
  const uint16_t* w_scale;  // bfloat16 [groups, kChannels]
  const uint16_t* w_min;    // bfloat16 [groups, kChannels], int4 only: weight = code * scale + minimum
  float* out;            // [rows, kChannels], overwritten
};
using TileFn = void (*)(const Tile&);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of int8 activations are int8 in their own order for VNNI and AMX, and for AVX2 times int4. Elsewhere they are int16, and
// within four inputs the even ones come first: the order in which shifts take them out of a 32-bit word.
constexpr int64_t kEvenFirst[4] = {0, 2, 1, 3};

// ---- portable: short loops over lanes, which compilers turn into SSE or NEON ----

template <int R>
void int8_portable(const Tile& t) {
  const int64_t group_steps = ceil_div(t.group, 4), steps = ceil_div(t.k, 4), groups = ceil_div(t.k, t.group);
  std::fill_n(t.out, R * kChannels, 0.f);
  for (int64_t g = 0; g < groups; ++g) {
    for (int r = 0; r < R; ++r) {
      int32_t sum[kChannels] = {};
      for (int64_t s = g * group_steps; s < std::min((g + 1) * group_steps, steps); ++s) {
        const int8_t* w = static_cast<const int8_t*>(t.w) + s * 64;
        const int16_t* v = static_cast<const int16_t*>(t.x) + r * t.x_stride + s * 4;  // inputs 0, 2, 1, 3
        for (int c = 0; c < kChannels; ++c)
          sum[c] += w[4 * c] * v[0] + w[4 * c + 1] * v[2] + w[4 * c + 2] * v[1] + w[4 * c + 3] * v[3];
      }
      for (int c = 0; c < kChannels; ++c)
        t.out[r * kChannels + c] +=
            static_cast<float>(sum[c]) * (from_bf16(t.w_scale[g * kChannels + c]) * t.x_scale[r * groups + g]);
    }
  }
}

template <int R>
void int4_portable(const Tile& t) {
  const int64_t group_steps = ceil_div(t.group, 8), steps = ceil_div(t.k, 8), groups = ceil_div(t.k, t.group);
  std::fill_n(t.out, R * kChannels, 0.f);
  for (int64_t g = 0; g < groups; ++g) {
    for (int r = 0; r < R; ++r) {
      int32_t sum[kChannels] = {};
      for (int64_t s = g * group_steps; s < std::min((g + 1) * group_steps, steps); ++s) {
        const uint8_t* w = static_cast<const uint8_t*>(t.w) + s * 64;
        const int16_t* v = static_cast<const int16_t*>(t.x) + r * t.x_stride + s * 8;
        for (int c = 0; c < kChannels; ++c)
          for (int j = 0; j < 4; ++j)
            sum[c] += (w[4 * c + j] & 15) * v[kEvenFirst[j]] + (w[4 * c + j] >> 4) * v[4 + kEvenFirst[j]];
      }
      const float x_scale = t.x_scale[r * groups + g], x_sum = x_scale * t.x_sum[r * groups + g];
      for (int c = 0; c < kChannels; ++c)
        t.out[r * kChannels + c] += static_cast<float>(sum[c]) * (from_bf16(t.w_scale[g * kChannels + c]) * x_scale) +
                                    x_sum * from_bf16(t.w_min[g * kChannels + c]);
    }
  }
}

template <int R>
void weight_only_portable(const Tile& t) {
  const int64_t group_steps = ceil_div(t.group, 4), steps = ceil_div(t.k, 4), groups = ceil_div(t.k, t.group);
  std::fill_n(t.out, R * kChannels, 0.f);
  for (int64_t g = 0; g < groups; ++g) {
    for (int r = 0; r < R; ++r) {
      float sum[kChannels] = {};
      for (int64_t s = g * group_steps; s < std::min((g + 1) * group_steps, steps); ++s) {
        const int8_t* w = static_cast<const int8_t*>(t.w) + s * 64;
        const float* v = static_cast<const float*>(t.x) + r * t.x_stride + s * 4;
        for (int c = 0; c < kChannels; ++c)
          for (int j = 0; j < 4; ++j) sum[c] += w[4 * c + j] * v[j];
      }
      for (int c = 0; c < kChannels; ++c) t.out[r * kChannels + c] += sum[c] * from_bf16(t.w_scale[g * kChannels + c]);
    }
  }
}

// As 32-bit words, `word << 16` is the even input, `word & ~0xffff` the odd.
template <int R>
void bf16_portable(const Tile& t) {
  for (int r = 0; r < R; ++r) {
    float sum[kChannels] = {};
    for (int64_t s = 0; s < ceil_div(t.k, 2); ++s) {
      uint32_t word[kChannels];
      std::memcpy(word, static_cast<const char*>(t.w) + s * 64, 64);
      const float* v = static_cast<const float*>(t.x) + r * t.x_stride + s * 2;
      for (int c = 0; c < kChannels; ++c) {
        sum[c] += from_bf16(static_cast<uint16_t>(word[c])) * v[0] + from_bf16(word[c] >> 16) * v[1];
      }
    }
    std::copy_n(sum, kChannels, t.out + r * kChannels);
  }
}

#if defined(__x86_64__)
// ---- AVX2: a line of a panel is two registers of 8 channels ----

TARGET_AVX2 INLINE_BODY __m256 eight_bf16(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}

constexpr int kPrefetch = 2048;  // bytes ahead: 10-15 % more bandwidth at one row; reading past the end is harmless

// Pairs of int16 are multiplied by vpmaddwd, which is exact. vpmaddubsw (8-bit, as in most int8 libraries) would
// saturate at 255 * 127 * 2, and the sign juggling that avoids it costs more than the shifts here.
template <int R>
TARGET_AVX2 NO_PRE void int8_avx2(const Tile& t) {
  const auto* x = static_cast<const int32_t*>(t.x);
  const auto* w = static_cast<const __m256i*>(t.w);
  const int64_t steps = ceil_div(t.k, 4), group_steps = ceil_div(t.group, 4), groups = ceil_div(t.k, t.group);
  const int64_t stride = t.x_stride / 2;
  __m256 out[R][2] = {};
  for (int64_t g = 0, s = 0; g < groups; ++g) {
    __m256i sum[R][2] = {};
    for (const int64_t end = std::min(s + group_steps, steps); s < end; ++s) {
      const __m256i a = _mm256_loadu_si256(w + 2 * s), b = _mm256_loadu_si256(w + 2 * s + 1);
      const __m256i a_even = _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8), a_odd = _mm256_srai_epi16(a, 8);
      const __m256i b_even = _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8), b_odd = _mm256_srai_epi16(b, 8);
      _mm_prefetch(w + 2 * s + kPrefetch / 32, _MM_HINT_T0);
      for (int r = 0; r < R; ++r) {
        const __m256i even = _mm256_set1_epi32(x[r * stride + 2 * s]);
        const __m256i odd = _mm256_set1_epi32(x[r * stride + 2 * s + 1]);
        sum[r][0] = _mm256_add_epi32(sum[r][0], _mm256_madd_epi16(a_even, even));
        sum[r][1] = _mm256_add_epi32(sum[r][1], _mm256_madd_epi16(b_even, even));
        sum[r][0] = _mm256_add_epi32(sum[r][0], _mm256_madd_epi16(a_odd, odd));
        sum[r][1] = _mm256_add_epi32(sum[r][1], _mm256_madd_epi16(b_odd, odd));
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int i = 0; i < 2; ++i) {
        const __m256 scale = _mm256_mul_ps(_mm256_set1_ps(t.x_scale[r * groups + g]),
                                           eight_bf16(t.w_scale + g * kChannels + 8 * i));
        out[r][i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[r][i]), scale, out[r][i]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < 2; ++i) _mm256_storeu_ps(t.out + r * kChannels + 8 * i, out[r][i]);
}

// Adds to `sum` the products of `kLines` lines. Codes are unsigned and small: vpmaddubsw multiplies them with int8 exactly, and
// 16 bits hold the sums of four lines (8 * 2 * 15 * 127).
template <int R, int kLines>
TARGET_AVX2 INLINE_BODY void add_int4_lines(const __m256i* w, const int32_t* x, int64_t stride, __m256i (&sum)[R][2]) {
  const __m256i low_bits = _mm256_set1_epi8(15);
  __m256i few[R][2] = {};
#pragma GCC unroll 4
  for (int line = 0; line < kLines; ++line) {
    const __m256i a = _mm256_loadu_si256(w + 2 * line), b = _mm256_loadu_si256(w + 2 * line + 1);
    const __m256i a_low = _mm256_and_si256(a, low_bits), a_high = _mm256_and_si256(_mm256_srli_epi16(a, 4), low_bits);
    const __m256i b_low = _mm256_and_si256(b, low_bits), b_high = _mm256_and_si256(_mm256_srli_epi16(b, 4), low_bits);
    _mm_prefetch(w + 2 * line + kPrefetch / 32, _MM_HINT_T0);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m256i low = _mm256_set1_epi32(x[r * stride + 2 * line]), high = _mm256_set1_epi32(x[r * stride + 2 * line + 1]);
      __m256i first = _mm256_add_epi16(few[r][0], _mm256_maddubs_epi16(a_low, low));
      __m256i second = _mm256_add_epi16(few[r][1], _mm256_maddubs_epi16(b_low, low));
      first = _mm256_add_epi16(first, _mm256_maddubs_epi16(a_high, high));
      second = _mm256_add_epi16(second, _mm256_maddubs_epi16(b_high, high));
      ROW_IS_DONE(first, second);
      few[r][0] = first;
      few[r][1] = second;
    }
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < 2; ++i)
      sum[r][i] = _mm256_add_epi32(sum[r][i], _mm256_madd_epi16(few[r][i], _mm256_set1_epi16(1)));
}

template <int R>
TARGET_AVX2 NO_PRE void int4_avx2(const Tile& t) {
  const auto* x = static_cast<const int32_t*>(t.x);
  const auto* w = static_cast<const __m256i*>(t.w);
  const int64_t steps = ceil_div(t.k, 8), group_steps = ceil_div(t.group, 8), groups = ceil_div(t.k, t.group);
  const int64_t stride = t.x_stride / 4;
  __m256 out[R][2] = {};
  for (int64_t g = 0, s = 0; g < groups; ++g) {
    __m256i sum[R][2] = {};
    const int64_t end = std::min(s + group_steps, steps);
    for (; s + 4 <= end; s += 4) add_int4_lines<R, 4>(w + 2 * s, x + 2 * s, stride, sum);
    for (; s < end; ++s) add_int4_lines<R, 1>(w + 2 * s, x + 2 * s, stride, sum);
    const uint16_t *scales = t.w_scale + g * kChannels, *minimums = t.w_min + g * kChannels;
    const __m256 w_scale[2] = {eight_bf16(scales), eight_bf16(scales + 8)};
    const __m256 w_min[2] = {eight_bf16(minimums), eight_bf16(minimums + 8)};
    for (int r = 0; r < R; ++r) {
      const __m256 x_scale = _mm256_set1_ps(t.x_scale[r * groups + g]);
      const __m256 x_sum = _mm256_mul_ps(x_scale, _mm256_set1_ps(t.x_sum[r * groups + g]));
      for (int i = 0; i < 2; ++i) {
        out[r][i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[r][i]), _mm256_mul_ps(x_scale, w_scale[i]), out[r][i]);
        out[r][i] = _mm256_fmadd_ps(x_sum, w_min[i], out[r][i]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < 2; ++i) _mm256_storeu_ps(t.out + r * kChannels + 8 * i, out[r][i]);
}

template <int R>
TARGET_AVX2 void weight_only_avx2(const Tile& t) {
  const auto* x = static_cast<const float*>(t.x);
  const auto* w = static_cast<const __m256i*>(t.w);
  const int64_t steps = ceil_div(t.k, 4), group_steps = ceil_div(t.group, 4), groups = ceil_div(t.k, t.group);
  __m256 out[R][2] = {};
  for (int64_t g = 0, s = 0; g < groups; ++g) {
    __m256 sum[R][2] = {};
    for (const int64_t end = std::min(s + group_steps, steps); s < end; ++s) {
      const __m256i a = _mm256_loadu_si256(w + 2 * s), b = _mm256_loadu_si256(w + 2 * s + 1);
      _mm_prefetch(w + 2 * s + kPrefetch / 32, _MM_HINT_T0);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        const __m256 fa = _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(a, 24 - 8 * k), 24));
        const __m256 fb = _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(b, 24 - 8 * k), 24));
        for (int r = 0; r < R; ++r) {
          const __m256 v = _mm256_set1_ps(x[r * t.x_stride + 4 * s + k]);
          sum[r][0] = _mm256_fmadd_ps(fa, v, sum[r][0]);
          sum[r][1] = _mm256_fmadd_ps(fb, v, sum[r][1]);
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int i = 0; i < 2; ++i) {
        out[r][i] = _mm256_fmadd_ps(sum[r][i], eight_bf16(t.w_scale + g * kChannels + 8 * i), out[r][i]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < 2; ++i) _mm256_storeu_ps(t.out + r * kChannels + 8 * i, out[r][i]);
}

template <int R>
TARGET_AVX2 NO_PRE void bf16_avx2(const Tile& t) {
  const auto* x = static_cast<const float*>(t.x);
  const auto* w = static_cast<const __m256i*>(t.w);
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  __m256 sum[R][2] = {};
  for (int64_t s = 0; s < ceil_div(t.k, 2); ++s) {
    const __m256i a = _mm256_loadu_si256(w + 2 * s), b = _mm256_loadu_si256(w + 2 * s + 1);
    const __m256 a_even = _mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), b_even = _mm256_castsi256_ps(_mm256_slli_epi32(b, 16));
    const __m256 a_odd = _mm256_castsi256_ps(_mm256_and_si256(a, upper)), b_odd = _mm256_castsi256_ps(_mm256_and_si256(b, upper));
    _mm_prefetch(w + 2 * s + kPrefetch / 32, _MM_HINT_T0);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m256 even = _mm256_set1_ps(x[r * t.x_stride + 2 * s]), odd = _mm256_set1_ps(x[r * t.x_stride + 2 * s + 1]);
      __m256 first = _mm256_fmadd_ps(a_odd, odd, _mm256_fmadd_ps(a_even, even, sum[r][0]));
      __m256 second = _mm256_fmadd_ps(b_odd, odd, _mm256_fmadd_ps(b_even, even, sum[r][1]));
      ROW_IS_DONE(first, second);
      sum[r][0] = first;
      sum[r][1] = second;
    }
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < 2; ++i) _mm256_storeu_ps(t.out + r * kChannels + 8 * i, sum[r][i]);
}
#endif

}  // namespace
