// The inner loops of linear.cpp: up to 4 rows times a panel of 16 output channels, over all inputs.
//
// They exist twice, for AVX2 and in portable C++, and are chosen at run time: a library built on one machine may be
// loaded by another CPU of the same family. A new instruction set is three more inner loops and one row in `kVariants`.
//
// A packed weight is int8 [ceil(N/8), ceil(K/4), 8, 4], zero padded: 32 bytes are 8 channels times 4 consecutive
// inputs. Seen as eight 32-bit lanes, each lane is one channel, so sums never cross lanes.
// Rows of activations have the even inputs of each block (4, or 16 for bfloat16) before its odd ones, zero padded:
// that is the order in which shifts take inputs out of a 32-bit word.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#define TARGET_AVX2 __attribute__((target("avx2,fma")))
#if defined(__clang__)
#define NO_PRE
#else  // GCC's partial redundancy elimination carries loads into the next turn and pushes sums out of registers
#define NO_PRE __attribute__((optimize("no-tree-pre")))
#endif
#endif

namespace {

constexpr int kRows = 4;       // 4 rows x 2 vectors = 8 accumulators, which leaves registers for weights: 6 rows spill
constexpr int kChannels = 16;  // output channels in a panel

// One call of an inner loop: up to kRows rows times one panel, over all of K.
struct Tile {
  const void* x;         // first row, from quantize_rows or arrange_rows
  int64_t x_stride;      // elements from row to row
  const void* w[2];      // packed: both 8-channel blocks of the panel; bfloat16: w[0] is the first channel
  int64_t k;             // inputs
  int64_t group;         // inputs per scale
  const float* x_scale;  // [rows, groups], int8 activations only
  const float* w_scale;  // [groups, kChannels]
  int channels;          // channels that exist: fewer than kChannels in the last panel
  float* out;            // [rows, kChannels], overwritten
};
using TileFn = void (*)(const Tile&);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- inner loops, portable: written as short loops over lanes, which compilers turn into SSE or NEON ----

template <int R, class X, class Sum>  // X int16, Sum int32: exact products of int8; X and Sum float: float activations
void packed_portable(const Tile& t) {
  const int64_t group_steps = ceil_div(t.group, 4), steps = ceil_div(t.k, 4), groups = ceil_div(t.k, t.group);
  std::fill_n(t.out, R * kChannels, 0.f);
  for (int64_t g = 0; g < groups; ++g) {
    for (int r = 0; r < R; ++r) {
      for (int n = 0; n < kChannels; n += 8) {
        Sum sum[8] = {};
        for (int64_t s = g * group_steps; s < std::min((g + 1) * group_steps, steps); ++s) {
          const int8_t* w = static_cast<const int8_t*>(t.w[n / 8]) + s * 32;
          const X* v = static_cast<const X*>(t.x) + r * t.x_stride + s * 4;  // inputs 0, 2, 1, 3
          for (int c = 0; c < 8; ++c)
            sum[c] += w[4 * c] * v[0] + w[4 * c + 1] * v[2] + w[4 * c + 2] * v[1] + w[4 * c + 3] * v[3];
        }
        for (int c = 0; c < 8; ++c) {
          const float scale = t.w_scale[g * kChannels + n + c] * (t.x_scale ? t.x_scale[r * groups + g] : 1.f);
          t.out[r * kChannels + n + c] += static_cast<float>(sum[c]) * scale;
        }
      }
    }
  }
}

// A bfloat16 is the upper half of a float32: as 32-bit words, `word << 16` is the even input, `word & ~0xffff` the odd.
template <int R>
void bf16_portable(const Tile& t) {
  const auto* x = static_cast<const float*>(t.x);
  for (int c = 0; c < t.channels; ++c) {
    const uint16_t* w = static_cast<const uint16_t*>(t.w[0]) + c * t.k;
    for (int r = 0; r < R; ++r) {
      float sum[8] = {};
      for (int64_t k = 0; k < t.k; k += 16) {
        uint32_t word[8] = {};
        std::memcpy(word, w + k, 2 * std::min<int64_t>(16, t.k - k));
        const float* v = x + r * t.x_stride + k;  // 8 even inputs, then 8 odd ones
        for (int i = 0; i < 8; ++i) {
          const uint32_t even_bits = word[i] << 16, odd_bits = word[i] & 0xffff0000u;
          float even, odd;
          std::memcpy(&even, &even_bits, 4);
          std::memcpy(&odd, &odd_bits, 4);
          sum[i] += even * v[i] + odd * v[i + 8];
        }
      }
      for (int i = 1; i < 8; ++i) sum[0] += sum[i];
      t.out[r * kChannels + c] = sum[0];
    }
  }
}

#if defined(__x86_64__)
// ---- inner loops, AVX2 ----

constexpr int kPrefetch = 1024;  // bytes ahead: 10-15 % more bandwidth at one row; reading past the end is harmless

// Pairs of int16 are multiplied by vpmaddwd, which is exact. vpmaddubsw (8-bit, as in most int8 libraries) would
// saturate at 255 * 127 * 2, and the sign juggling that avoids it costs more than the shifts here.
template <int R>
TARGET_AVX2 NO_PRE void int8_avx2(const Tile& t) {
  const auto* x = static_cast<const int32_t*>(t.x);
  const auto *w0 = static_cast<const __m256i*>(t.w[0]), *w1 = static_cast<const __m256i*>(t.w[1]);
  const int64_t steps = ceil_div(t.k, 4), group_steps = ceil_div(t.group, 4), groups = ceil_div(t.k, t.group);
  const int64_t stride = t.x_stride / 2;
  __m256 out[R][2] = {};
  for (int64_t g = 0, s = 0; g < groups; ++g) {
    __m256i sum[R][2] = {};
    for (const int64_t end = std::min(s + group_steps, steps); s < end; ++s) {
      const __m256i a = _mm256_loadu_si256(w0 + s), b = _mm256_loadu_si256(w1 + s);
      const __m256i a_even = _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8), a_odd = _mm256_srai_epi16(a, 8);
      const __m256i b_even = _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8), b_odd = _mm256_srai_epi16(b, 8);
      _mm_prefetch(w0 + s + kPrefetch / 32, _MM_HINT_T0);
      _mm_prefetch(w1 + s + kPrefetch / 32, _MM_HINT_T0);
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
                                           _mm256_loadu_ps(t.w_scale + g * kChannels + 8 * i));
        out[r][i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[r][i]), scale, out[r][i]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < 2; ++i) _mm256_storeu_ps(t.out + r * kChannels + 8 * i, out[r][i]);
}

template <int R>
TARGET_AVX2 void weight_only_avx2(const Tile& t) {
  constexpr int kParts = R == 1 ? 4 : R == 2 ? 2 : 1;  // an FMA takes 4 cycles: 8 independent sums hide that
  const auto* x = static_cast<const float*>(t.x);
  const auto *w0 = static_cast<const __m256i*>(t.w[0]), *w1 = static_cast<const __m256i*>(t.w[1]);
  const int64_t steps = ceil_div(t.k, 4), group_steps = ceil_div(t.group, 4), groups = ceil_div(t.k, t.group);
  __m256 out[R][2] = {};
  for (int64_t g = 0, s = 0; g < groups; ++g) {
    __m256 sum[kParts][R][2] = {};
    for (const int64_t end = std::min(s + group_steps, steps); s < end; ++s) {
      const __m256i a = _mm256_loadu_si256(w0 + s), b = _mm256_loadu_si256(w1 + s);
      _mm_prefetch(w0 + s + kPrefetch / 32, _MM_HINT_T0);
      _mm_prefetch(w1 + s + kPrefetch / 32, _MM_HINT_T0);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        const __m256 fa = _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(a, 24 - 8 * k), 24));
        const __m256 fb = _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(b, 24 - 8 * k), 24));
        for (int r = 0; r < R; ++r) {
          const __m256 v = _mm256_set1_ps(x[r * t.x_stride + 4 * s + k / 2 + k % 2 * 2]);
          sum[k % kParts][r][0] = _mm256_fmadd_ps(fa, v, sum[k % kParts][r][0]);
          sum[k % kParts][r][1] = _mm256_fmadd_ps(fb, v, sum[k % kParts][r][1]);
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int i = 0; i < 2; ++i) {
        for (int p = 1; p < kParts; ++p) sum[0][r][i] = _mm256_add_ps(sum[0][r][i], sum[p][r][i]);
        out[r][i] = _mm256_fmadd_ps(sum[0][r][i], _mm256_loadu_ps(t.w_scale + g * kChannels + 8 * i), out[r][i]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < 2; ++i) _mm256_storeu_ps(t.out + r * kChannels + 8 * i, out[r][i]);
}

TARGET_AVX2 inline float horizontal_sum(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

template <int R>
TARGET_AVX2 void bf16_avx2(const Tile& t) {
  const auto* x = static_cast<const float*>(t.x);
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  for (int c = 0; c < t.channels; ++c) {
    const uint16_t* w = static_cast<const uint16_t*>(t.w[0]) + c * t.k;
    __m256 sum[R][2] = {};
    for (int64_t k = 0; k < t.k; k += 16) {
      __m256i word;
      if (k + 16 <= t.k) {
        word = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + k));
        _mm_prefetch(w + k + kPrefetch / 2, _MM_HINT_T0);
      } else {  // the last row may end at the end of its allocation
        word = _mm256_setzero_si256();
        std::memcpy(&word, w + k, 2 * (t.k - k));
      }
      const __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(word, 16));
      const __m256 odd = _mm256_castsi256_ps(_mm256_and_si256(word, upper));
      for (int r = 0; r < R; ++r) {
        sum[r][0] = _mm256_fmadd_ps(even, _mm256_loadu_ps(x + r * t.x_stride + k), sum[r][0]);
        sum[r][1] = _mm256_fmadd_ps(odd, _mm256_loadu_ps(x + r * t.x_stride + k + 8), sum[r][1]);
      }
    }
    for (int r = 0; r < R; ++r) t.out[r * kChannels + c] = horizontal_sum(_mm256_add_ps(sum[r][0], sum[r][1]));
  }
}
#endif

// ---- choice of the variant ----

struct Variant {
  const char* name;
  bool (*supported)();
  TileFn int8[kRows], weight_only[kRows], bf16[kRows];  // indexed by rows - 1
};
#define BY_ROWS(f) {f<1>, f<2>, f<3>, f<4>}

template <int R>
constexpr TileFn int8_portable = packed_portable<R, int16_t, int32_t>;
template <int R>
constexpr TileFn weight_only_portable = packed_portable<R, float, float>;

// Best first.
const Variant kVariants[] = {
#if defined(__x86_64__)
    {"avx2", [] { return __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0; },
     BY_ROWS(int8_avx2), BY_ROWS(weight_only_avx2), BY_ROWS(bf16_avx2)},
#endif
    {"portable", [] { return true; }, BY_ROWS(int8_portable), BY_ROWS(weight_only_portable), BY_ROWS(bf16_portable)},
};

}  // namespace
