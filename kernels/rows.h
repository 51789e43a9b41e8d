// A few query rows at a time against keys and values laid out for it: the loops that attention.cpp and prompt_attention.cpp
// share. Several rows take several vectors of columns together, so that sums hide each other's latency and each line that is
// read serves all of them. A row's result does not depend on how many there are.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "vector.h"

namespace {

constexpr int64_t kColumns = 2 * kLanes;  // keys, and numbers of a value, are padded to so many

INLINE_BODY int64_t padded(int64_t n) { return (n + kColumns - 1) / kColumns * kColumns; }

// R rows `a` times C vectors of columns of `b`: out[r][c] = sum of a[r][i] * b[i][c] over i < k.
template <class V, int R, int C>
INLINE_BODY void multiply(const float* const (&a)[R], const float* b, int64_t b_row, int64_t b_vector, int64_t k, float* out,
                          int64_t out_row) {
  V sum[R][C] = {};
  for (int64_t i = 0; i < k; ++i) {
    V columns[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) read(columns[c], b + i * b_row + c * b_vector);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sum[r][c] += a[r][i] * columns[c];
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) std::memcpy(out + r * out_row + c * kWidth<V>, &sum[r][c], sizeof(V));
}

// The largest of `count` scores, at least one, which have room for a multiple of 16.
template <class V>
INLINE_BODY float largest_of(float* p, int64_t count) {
  const int64_t end = (count + kLanes - 1) / kLanes * kLanes;
  std::fill(p + count, p + end, p[0]);
  V most, v;
  read(most, p);
  for (int64_t j = kWidth<V>; j < end; j += kWidth<V>) {
    read(v, p + j);
    most = v > most ? v : most;
  }
  float largest = most[0];
  for (int64_t lane = 1; lane < kWidth<V>; ++lane) largest = std::max(largest, most[lane]);
  return largest;
}

// Such scores become exp(score - largest), what follows them up to a multiple of 16 zero. Returns their sum.
template <class V>
INLINE_BODY float exponentials(float* p, int64_t count, float largest) {
  const int64_t end = (count + kLanes - 1) / kLanes * kLanes;
  for (int64_t j = 0; j < end; ++j) p[j] = fast_exp(p[j] - largest);
  std::fill(p + count, p + end, 0.f);
  V v, sums = {};
  for (int64_t j = 0; j < end; j += kWidth<V>) {
    read(v, p + j);
    sums += v;
  }
  float total = 0.f;
  for (int64_t lane = 0; lane < kWidth<V>; ++lane) total += sums[lane];
  return total;
}

template <class V, int... I>
INLINE_BODY V interleaved(V a, V b, int from, std::integer_sequence<int, I...>) {
  constexpr int width = sizeof...(I);
#if defined(__clang__)
  return from ? __builtin_shufflevector(a, b, (I % 2 * width + width / 2 + I / 2)...)
              : __builtin_shufflevector(a, b, (I % 2 * width + I / 2)...);
#else  // GCC has the other since 12 only
  using Places = decltype(a == b);
  return from ? __builtin_shuffle(a, b, Places{(I % 2 * width + width / 2 + I / 2)...})
              : __builtin_shuffle(a, b, Places{(I % 2 * width + I / 2)...});
#endif
}

// As many rows as a vector is wide, in place: rows become columns. Each step turns the bits of an element's place, its row's
// before its column's, by one: after as many steps as either has bits they have changed places.
template <class V>
INLINE_BODY void transpose(V (&rows)[kWidth<V>]) {
  constexpr int width = kWidth<V>;
  constexpr std::make_integer_sequence<int, width> lanes{};
#pragma GCC unroll 4
  for (int step = 1; step < width; step *= 2) {
    V turned[width];
#pragma GCC unroll 8
    for (int i = 0; i < width / 2; ++i) {
      turned[2 * i] = interleaved(rows[i], rows[i + width / 2], 0, lanes);
      turned[2 * i + 1] = interleaved(rows[i], rows[i + width / 2], 1, lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < width; ++i) rows[i] = turned[i];
  }
}

}  // namespace
