// Products of few rows (of any number, where no loop for many exists): each panel of a weight passes once through the cache and is multiplied with all of them.
//
// One row and sixteen take the same sums in the same order, so that a draft that is checked at once comes out as one token
// at a time would. Also here: what a product of many rows (many_rows.h) shares with it.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <atomic>
#include <optional>

#include "variants.h"

namespace {

using at::Tensor;
using std::optional;

constexpr int64_t kFewRows = 16;
constexpr int64_t kWorthAThread = 1 << 17;  // bytes of weights times rows that take longer than waking a thread

const Variant* active = nullptr;  // chosen in linear.cpp

struct Weight {
  const char* data;
  int64_t panel_bytes, n, k, group;
  const uint16_t *scale, *minimum;  // bfloat16 [panels, groups, kChannels] or null
  int64_t panels() const { return ceil_div(n, kChannels); }
  int64_t groups() const { return ceil_div(k, group); }
};

struct Rows {
  Tensor x, scale, sum;  // float32 rows, or int8 ones with a scale and a sum per group; for many rows int8 or bf16 tiles
  int64_t m;
  int64_t row_bytes() const { return x.size(1) * static_cast<int64_t>(x.element_size()); }
};

// Calls `work(first, last)` for all panels in torch's own threads. A thread takes its next share when it is done with one:
// halves that are dealt out beforehand wait for the slower thread, product after product. Shares shrink towards the end: a
// long run of panels comes faster from memory than many short ones, and short ones finish together.
template <class Work>
void share_panels(int64_t panels, int64_t bytes, const Work& work) {
  const int64_t threads = bytes < kWorthAThread ? 1 : at::get_num_threads();
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t first = next; first < panels;) {
      const int64_t last = first + std::max<int64_t>(1, (panels - first) / threads / 4);
      if (!next.compare_exchange_weak(first, last)) continue;  // another thread was first: `first` is what is next now
      work(first, last);
      first = next;
    }
  });
}

INLINE_BODY void write_rows(const float* from, int64_t from_stride, int64_t rows, int64_t channels, const float* bias, float* y,
                int64_t n) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < channels; ++c) y[r * n + c] = from[r * from_stride + c] + (bias ? bias[c] : 0.f);
}

// The extra 64 bytes keep rows of 2^n inputs off the same cache sets.
Rows int8_rows(const Quantized& as, const Tensor& x, int64_t group) {
  const int64_t m = x.size(0), k = x.size(1), groups = ceil_div(k, group), width = ceil_div(k, 64) * 64 + 64;
  Rows rows{at::zeros({m, width}, as.dtype), at::empty({m, groups}, at::kFloat),
            at::empty({m, groups}, at::kFloat), m};
  const float* from = x.const_data_ptr<float>();
  float *scales = rows.scale.mutable_data_ptr<float>(), *sums = rows.sum.mutable_data_ptr<float>();
  char* to = static_cast<char*>(rows.x.mutable_data_ptr());
  at::parallel_for(0, m, ceil_div(32768, k), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      as.quantize(from + r * k, k, group, to + r * rows.row_bytes(), scales + r * groups, sums + r * groups);
  });
  return rows;
}

// float32 rows as the inner loops want them: an even number of inputs, or a multiple of four.
Rows float_rows(const Tensor& x, int64_t multiple) {
  const int64_t missing = ceil_div(x.size(1), multiple) * multiple - x.size(1);
  return {missing ? at::constant_pad_nd(x, {0, missing}) : x, {}, {}, x.size(0)};
}

// Few rows: `tiles` over all panels, in torch's own threads.
Tensor multiply_few(const TileFn* tiles, const Rows& rows, const Weight& w, const optional<Tensor>& bias) {
  Tensor out = at::empty({rows.m, w.n}, at::kFloat);
  float* y = out.mutable_data_ptr<float>();
  const float* b = bias.has_value() ? bias->const_data_ptr<float>() : nullptr;
  const int64_t groups = w.groups();
  share_panels(w.panels(), w.panels() * w.panel_bytes * rows.m, [&](int64_t begin, int64_t end) {
    float result[kMaxRows * kChannels];
    Tile t{};
    t.x_stride = rows.x.size(1);
    t.k = w.k;
    t.group = w.group;
    t.out = result;
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first = panel * kChannels;
      t.w = w.data + panel * w.panel_bytes;
      t.w_scale = w.scale ? w.scale + first * groups : nullptr;
      t.w_min = w.minimum ? w.minimum + first * groups : nullptr;
      for (int64_t row = 0; row < rows.m; row += active->rows) {
        const int64_t count = std::min<int64_t>(active->rows, rows.m - row);
        t.x = static_cast<const char*>(rows.x.const_data_ptr()) + row * rows.row_bytes();
        if (rows.scale.defined()) {
          t.x_scale = rows.scale.const_data_ptr<float>() + row * groups;
          t.x_sum = rows.sum.const_data_ptr<float>() + row * groups;
        }
        tiles[count - 1](t);
        write_rows(result, kChannels, count, std::min<int64_t>(kChannels, w.n - first), b ? b + first : nullptr,
                   y + row * w.n + first, w.n);
      }
    }
  });
  return out;
}

}  // namespace
