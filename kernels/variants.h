// The variants of the inner loops, and how each wants its int8 activations.
#pragma once

#include <c10/core/ScalarType.h>

#include <cmath>
#include <limits>

#include "amx.h"
#include "many_avx512.h"
#include "tiles.h"
#include "tiles_avx512.h"

namespace {

// ---- activations in int8 ----

// Symmetric int8 of one row: per group of inputs a scale and the sum of the integers. A group that holds NaN or Inf gets
// scale NaN, so that its row's outputs become NaN instead of plausible numbers. Q int8: in order; int16: even inputs first.
template <class Q>
INLINE_BODY void quantize(const float* x, int64_t k, int64_t group, void* q_row, float* scales,
                                                    float* sums) {
  for (int64_t g = 0; g * group < k; ++g) {
    const float* from = x + g * group;
    Q* to = static_cast<Q*>(q_row) + g * group;
    const int64_t size = std::min(group, k - g * group);
    int32_t largest = 0;  // bit patterns of |x| order like the values, and NaN above Inf above all numbers
    for (int64_t i = 0; i < size; ++i) {
      int32_t bits;
      std::memcpy(&bits, from + i, 4);
      largest = std::max(largest, bits & 0x7fffffff);
    }
    float scale;
    std::memcpy(&scale, &largest, 4);
    scale = std::isfinite(scale) ? scale / 127.f : std::numeric_limits<float>::quiet_NaN();
    scales[g] = scale;
    int32_t sum = 0;
    if (scale > 0.f) {
      for (int64_t i = 0; i < size; ++i) {
        // Adding 1.5 * 2^23 rounds half to even in every variant. The bound matters for denormal scales only.
        const float rounded = (from[i] / scale + 12582912.f) - 12582912.f;
        const auto value = static_cast<int32_t>(std::min(std::max(rounded, -127.f), 127.f));
        to[sizeof(Q) == 1 ? i : i / 4 * 4 + kEvenFirst[i % 4]] = static_cast<Q>(value);
        sum += value;
      }
    }
    sums[g] = static_cast<float>(sum);
  }
}

using QuantizeFn = void (*)(const float*, int64_t, int64_t, void*, float*, float*);
void quantize_portable(const float* x, int64_t k, int64_t group, void* q, float* scales, float* sums) {
  quantize<int16_t>(x, k, group, q, scales, sums);
}
#if defined(__x86_64__)
TARGET_AVX2 void quantize_avx2(const float* x, int64_t k, int64_t group, void* q, float* scales, float* sums) {
  quantize<int16_t>(x, k, group, q, scales, sums);
}
TARGET_AVX2 void quantize_avx2_bytes(const float* x, int64_t k, int64_t group, void* q, float* scales, float* sums) {
  quantize<int8_t>(x, k, group, q, scales, sums);
}
TARGET_AVX512 void quantize_avx512(const float* x, int64_t k, int64_t group, void* q, float* scales, float* sums) {
  quantize<int8_t>(x, k, group, q, scales, sums);
}
#endif

// ---- choice of the variant ----

// How many rows are multiplied: null where few rows at a time are as good as it gets.
struct ManyRows {
#if defined(__x86_64__)
  BlockFn int8, bf16;
  int block_rows;             // at most, in one call
  bool tiles;                 // whether rows are cut into tiles for matrix units,
  void (*enter)(), (*leave)();  // which each thread sets up and gives back
#endif
};

// How int8 activations are kept for the inner loops.
struct Quantized {
  at::ScalarType dtype;
  QuantizeFn quantize;
};

struct Variant {
  const char* name;
  Isa isa;
  bool (*supported)();
  ManyRows many;
  int rows;                   // at most, in one call of an inner loop for few rows
  Quantized for_int8, for_int4;
  TileFn int8[kMaxRows], int4[kMaxRows], weight_only[kMaxRows], bf16[kMaxRows];  // indexed by rows - 1
};
#define UP_TO_4(f) {f<1>, f<2>, f<3>, f<4>}
#define UP_TO_8(f) {f<1>, f<2>, f<3>, f<4>, f<5>, f<6>, f<7>, f<8>}

#if defined(__x86_64__)
constexpr Quantized kInOrder = {at::kChar, quantize_avx512};
// What a CPU with matrix units takes where groups of inputs do not fill tiles.
constexpr ManyRows kInt8Vectors = {int8_block_avx512, nullptr, kVectorBlockRows, false, nullptr, nullptr};
#endif

// Best first. AVX2 has registers for the sums of 4 rows x 2 vectors, AVX512 for 8 rows.
const Variant kVariants[] = {
#if defined(HAVE_AMX)
    {"amx", Isa::kAvx512, has_amx, {int8_block_amx, bf16_block_amx, kMaxBlockRows, true, set_up_tiles, give_tiles_back}, 8,
     kInOrder, kInOrder, UP_TO_8(int8_avx512), UP_TO_8(int4_avx512), UP_TO_8(weight_only_avx512), UP_TO_8(bf16_avx512)},
#endif
#if defined(__x86_64__)
    {"avx512_bf16", Isa::kAvx512, has_avx512_bf16, {int8_block_avx512, bf16_block_avx512, kVectorBlockRows}, 8,
     kInOrder, kInOrder, UP_TO_8(int8_avx512), UP_TO_8(int4_avx512), UP_TO_8(weight_only_avx512), UP_TO_8(bf16_avx512)},
    {"avx512_vnni", Isa::kAvx512, has_avx512, {int8_block_avx512, nullptr, kVectorBlockRows}, 8,
     kInOrder, kInOrder, UP_TO_8(int8_avx512), UP_TO_8(int4_avx512), UP_TO_8(weight_only_avx512), UP_TO_8(bf16_avx512)},
    {"avx2", Isa::kAvx2, [] { return __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0; }, {}, 4,
     {at::kShort, quantize_avx2}, {at::kChar, quantize_avx2_bytes}, UP_TO_4(int8_avx2), UP_TO_4(int4_avx2),
     UP_TO_4(weight_only_avx2), UP_TO_4(bf16_avx2)},
#endif
    {"portable", Isa::kPortable, [] { return true; }, {}, 4, {at::kShort, quantize_portable}, {at::kShort, quantize_portable},
     UP_TO_4(int8_portable), UP_TO_4(int4_portable), UP_TO_4(weight_only_portable), UP_TO_4(bf16_portable)},
};

}  // namespace
