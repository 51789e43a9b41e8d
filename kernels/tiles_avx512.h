// The inner loops of tiles.h for AVX512: a line of a panel is one register of 16 channels.
#pragma once

#include "tiles.h"

#if defined(__x86_64__)
namespace {

inline bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}

// Into the second-level cache: prefetches into the first wait for its few miss buffers (Zen 4: 5 % more bandwidth at one row).
constexpr int kPrefetchFar = 4096;

TARGET_AVX512 inline __m512i line_at(const void* w, int64_t line) {
  const char* p = static_cast<const char*>(w) + line * 64;
  _mm_prefetch(p + kPrefetchFar, _MM_HINT_T1);
  return _mm512_loadu_si512(p);
}

TARGET_AVX512 INLINE_BODY __m512 sixteen_bf16(const uint16_t* p) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}

// vpdpbusd multiplies unsigned by signed bytes, exactly. Flipping the top bit of a weight adds 128 to it; the sums start
// at -128 * (sum of the inputs) to take that back. Sums may wrap on the way: the last one fits.
template <int R>
TARGET_AVX512 void int8_avx512(const Tile& t) {
  const auto* x = static_cast<const int32_t*>(t.x);  // 4 inputs each
  const int64_t steps = ceil_div(t.k, 4), group_steps = ceil_div(t.group, 4), groups = ceil_div(t.k, t.group);
  const int64_t stride = t.x_stride / 4;
  const __m512i top_bits = _mm512_set1_epi8(-128);
  __m512 out[R] = {};
  for (int64_t g = 0, s = 0; g < groups; ++g) {
    __m512i sum[R];
    for (int r = 0; r < R; ++r) sum[r] = _mm512_set1_epi32(-128 * static_cast<int32_t>(t.x_sum[r * groups + g]));
    for (const int64_t end = std::min(s + group_steps, steps); s < end; ++s) {
      const __m512i w = _mm512_xor_si512(line_at(t.w, s), top_bits);
      for (int r = 0; r < R; ++r) sum[r] = _mm512_dpbusd_epi32(sum[r], w, _mm512_set1_epi32(x[r * stride + s]));
    }
    const __m512 w_scale = sixteen_bf16(t.w_scale + g * kChannels);
    for (int r = 0; r < R; ++r) {
      const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(t.x_scale[r * groups + g]), w_scale);
      out[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r]), scale, out[r]);
    }
  }
  for (int r = 0; r < R; ++r) _mm512_storeu_ps(t.out + r * kChannels, out[r]);
}

template <int R>
TARGET_AVX512 void int4_avx512(const Tile& t) {
  const auto* x = static_cast<const int32_t*>(t.x);
  const int64_t steps = ceil_div(t.k, 8), group_steps = ceil_div(t.group, 8), groups = ceil_div(t.k, t.group);
  const int64_t stride = t.x_stride / 4;
  const __m512i low_bits = _mm512_set1_epi8(15);
  __m512 out[R] = {};
  for (int64_t g = 0, s = 0; g < groups; ++g) {
    __m512i low[R] = {}, high[R] = {};
    for (const int64_t end = std::min(s + group_steps, steps); s < end; ++s) {
      const __m512i line = line_at(t.w, s);
      const __m512i w0 = _mm512_and_si512(line, low_bits);
      const __m512i w1 = _mm512_and_si512(_mm512_srli_epi16(line, 4), low_bits);
      for (int r = 0; r < R; ++r) {
        low[r] = _mm512_dpbusd_epi32(low[r], w0, _mm512_set1_epi32(x[r * stride + 2 * s]));
        high[r] = _mm512_dpbusd_epi32(high[r], w1, _mm512_set1_epi32(x[r * stride + 2 * s + 1]));
      }
    }
    const __m512 w_scale = sixteen_bf16(t.w_scale + g * kChannels);
    const __m512 w_min = sixteen_bf16(t.w_min + g * kChannels);
    for (int r = 0; r < R; ++r) {
      const float x_scale = t.x_scale[r * groups + g];
      const __m512 sum = _mm512_cvtepi32_ps(_mm512_add_epi32(low[r], high[r]));
      out[r] = _mm512_fmadd_ps(sum, _mm512_mul_ps(_mm512_set1_ps(x_scale), w_scale), out[r]);
      out[r] = _mm512_fmadd_ps(_mm512_set1_ps(x_scale * t.x_sum[r * groups + g]), w_min, out[r]);
    }
  }
  for (int r = 0; r < R; ++r) _mm512_storeu_ps(t.out + r * kChannels, out[r]);
}

template <int R>
TARGET_AVX512 void weight_only_avx512(const Tile& t) {
  constexpr int kParts = 2;  // an FMA takes 4 cycles; the same order of sums for any number of rows
  const auto* x = static_cast<const float*>(t.x);
  const int64_t steps = ceil_div(t.k, 4), group_steps = ceil_div(t.group, 4), groups = ceil_div(t.k, t.group);
  __m512 out[R] = {};
  for (int64_t g = 0, s = 0; g < groups; ++g) {
    __m512 sum[kParts][R] = {};
    for (const int64_t end = std::min(s + group_steps, steps); s < end; ++s) {
      const __m512i line = line_at(t.w, s);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        const __m512 w = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(line, 24 - 8 * k), 24));
        for (int r = 0; r < R; ++r)
          sum[k % kParts][r] = _mm512_fmadd_ps(w, _mm512_set1_ps(x[r * t.x_stride + 4 * s + k]), sum[k % kParts][r]);
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int p = 1; p < kParts; ++p) sum[0][r] = _mm512_add_ps(sum[0][r], sum[p][r]);
      out[r] = _mm512_fmadd_ps(sum[0][r], sixteen_bf16(t.w_scale + g * kChannels), out[r]);
    }
  }
  for (int r = 0; r < R; ++r) _mm512_storeu_ps(t.out + r * kChannels, out[r]);
}

template <int R>
TARGET_AVX512 void bf16_avx512(const Tile& t) {
  const auto* x = static_cast<const float*>(t.x);
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  __m512 even[R] = {}, odd[R] = {};
  const int64_t steps = ceil_div(t.k, 2);
  for (int64_t s = 0; s < steps; ++s) {
    const __m512i word = line_at(t.w, s);
    const __m512 w0 = _mm512_castsi512_ps(_mm512_slli_epi32(word, 16));
    const __m512 w1 = _mm512_castsi512_ps(_mm512_and_si512(word, upper));
    for (int r = 0; r < R; ++r) {
      const float* v = x + r * t.x_stride + 2 * s;
      even[r] = _mm512_fmadd_ps(w0, _mm512_set1_ps(v[0]), even[r]);
      odd[r] = _mm512_fmadd_ps(w1, _mm512_set1_ps(v[1]), odd[r]);
    }
  }
  for (int r = 0; r < R; ++r) _mm512_storeu_ps(t.out + r * kChannels, _mm512_add_ps(even[r], odd[r]));
}

}  // namespace
#endif
