// Vectors of float32 as wide as the registers of an instruction set, exp for them, and what a cache holds as float32.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "isa.h"

namespace {

// GCC keeps vectors that are wider than the registers in memory: AVX512, AVX2 and portable loops take one of these each.
typedef float Vec __attribute__((vector_size(64)));
typedef float Vec8 __attribute__((vector_size(32)));
typedef float Vec4 __attribute__((vector_size(16)));
template <class V>
constexpr int64_t kWidth = sizeof(V) / sizeof(float);
constexpr int64_t kLanes = kWidth<Vec>;  // of the widest

template <class V>
INLINE_BODY void read(V& v, const float* p) { std::memcpy(&v, p, sizeof v); }

INLINE_BODY float from_bf16(uint16_t v) {  // a bfloat16 is the upper half of a float32
  const uint32_t bits = static_cast<uint32_t>(v) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

INLINE_BODY float widened(float v) { return v; }
INLINE_BODY float widened(int8_t v) { return static_cast<float>(v); }
INLINE_BODY float widened(uint16_t v) { return from_bf16(v); }

// exp(x) for x <= 0, to 2e-7 relative: 2^n times a polynomial of the rest.
INLINE_BODY float fast_exp(float x) {
  const float t = std::max(x, -87.f) * 1.44269504f, n = (t + 12582912.f) - 12582912.f, f = t - n;
  float p = 1.5403530e-4f;  // Taylor series of 2^f, |f| <= 0.5
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return p * power;
}

}  // namespace
