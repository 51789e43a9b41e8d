// Linear layers that read few bytes: int8 weights with int8 or float activations, and bfloat16 weights.
//
// A decode step multiplies one row with every weight, so its time is the time to read the weights. A prefill
// multiplies hundreds of rows, so its time is arithmetic. One walk serves both: a panel of 16 output channels is read
// from memory once, and up to 4 rows at a time pass over it while it lies in the cache. tiles.h holds the inner loops.
#include <ATen/Parallel.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "tiles.h"

namespace {

using at::Tensor;
using std::optional;

constexpr int64_t kMaxGroup = 131072;  // 127 * 127 * kMaxGroup still fits int32

const Variant* active = nullptr;

// Makes the named variant the active one, or with "" the best that this CPU runs. Returns its name.
std::string select_variant(const std::string& name) {
  for (const Variant& v : kVariants) {
    if (!v.supported() || (!name.empty() && name != v.name)) continue;
    active = &v;
    return v.name;
  }
  TORCH_CHECK(false, "this CPU cannot run a variant named '", name, "'");
}

// ---- preparation of the rows, and the walk over panels ----

// Within each block of inputs, the even ones come first: the order in which the inner loops meet them.
int64_t place(int64_t k, int64_t block) { return k - k % block + k % 2 * (block / 2) + k % block / 2; }

// Rows of `block`-padded elements. The extra 64 bytes keep rows of 2^n inputs off the same cache sets.
Tensor padded_rows(int64_t rows, int64_t k, int64_t block, at::ScalarType dtype) {
  return at::zeros({rows, ceil_div(k, block) * block + 64 / static_cast<int64_t>(c10::elementSize(dtype))}, dtype);
}

Tensor arrange_rows(const Tensor& x, int64_t block) {
  const int64_t k = x.size(1);
  Tensor out = padded_rows(x.size(0), k, block, at::kFloat);
  at::parallel_for(0, x.size(0), ceil_div(32768, k), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const float* from = x.const_data_ptr<float>() + m * k;
      float* to = out.mutable_data_ptr<float>() + m * out.size(1);
      for (int64_t i = 0; i < k; ++i) to[place(i, block)] = from[i];
    }
  });
  return out;
}

// Symmetric int8 per row and group, kept as int16. A group that holds NaN or Inf gets scale NaN, so that its row's
// outputs become NaN instead of plausible numbers.
std::pair<Tensor, Tensor> quantize_rows(const Tensor& x, int64_t group) {
  const int64_t k = x.size(1), groups = ceil_div(k, group);
  Tensor q = padded_rows(x.size(0), k, 4, at::kShort);
  Tensor scales = at::empty({x.size(0), groups}, at::kFloat);
  at::parallel_for(0, x.size(0), ceil_div(32768, k), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      int16_t* to = q.mutable_data_ptr<int16_t>() + m * q.size(1);
      for (int64_t g = 0; g < groups; ++g) {
        const float* from = x.const_data_ptr<float>() + m * k;
        const int64_t first = g * group, last = std::min(first + group, k);
        int32_t largest = 0;  // bit patterns of |x| order like the values, and NaN above Inf above all numbers
        for (int64_t i = first; i < last; ++i) {
          int32_t bits;
          std::memcpy(&bits, from + i, 4);
          largest = std::max(largest, bits & 0x7fffffff);
        }
        float scale;
        std::memcpy(&scale, &largest, 4);
        scale = std::isfinite(scale) ? scale / 127.f : std::numeric_limits<float>::quiet_NaN();
        scales.mutable_data_ptr<float>()[m * groups + g] = scale;
        if (!(scale > 0.f)) continue;
        for (int64_t i = first; i < last; ++i) {
          // Adding 1.5 * 2^23 rounds half to even in every variant. The bound matters for denormal scales only.
          const float rounded = (from[i] / scale + 12582912.f) - 12582912.f;
          to[place(i, 4)] = static_cast<int16_t>(std::clamp(rounded, -127.f, 127.f));
        }
      }
    }
  });
  return {q, scales};
}

// Runs `tiles` over all panels, in torch's own threads. `common` holds what all calls share; `enter_panel` sets the
// weights for the panel that starts at a channel.
template <class EnterPanel>
Tensor multiply(const TileFn* tiles, const Tile& common, int64_t row_bytes, int64_t m, int64_t n,
                const optional<Tensor>& bias, EnterPanel enter_panel) {
  Tensor out = at::empty({m, n}, at::kFloat);
  float* y = out.mutable_data_ptr<float>();
  const float* b = bias.has_value() ? bias->const_data_ptr<float>() : nullptr;
  const int64_t groups = ceil_div(common.k, common.group);
  const int64_t grain = ceil_div(1 << 18, m * common.k * kChannels + 1);
  at::parallel_for(0, ceil_div(n, kChannels), grain, [&](int64_t begin, int64_t end) {
    Tile t = common;
    std::vector<float> w_scale(groups * kChannels, 0.f);
    float result[kRows * kChannels];
    t.out = result;
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first = panel * kChannels;
      t.channels = static_cast<int>(std::min<int64_t>(kChannels, n - first));
      enter_panel(t, first, w_scale.data());
      t.w_scale = w_scale.data();
      for (int64_t row = 0; row < m; row += kRows) {
        const int rows = static_cast<int>(std::min<int64_t>(kRows, m - row));
        t.x = static_cast<const char*>(common.x) + row * row_bytes;
        t.x_scale = common.x_scale ? common.x_scale + row * groups : nullptr;
        tiles[rows - 1](t);
        for (int r = 0; r < rows; ++r)
          for (int c = 0; c < t.channels; ++c)
            y[(row + r) * n + first + c] = result[r * kChannels + c] + (b ? b[first + c] : 0.f);
      }
    }
  });
  return out;
}

// ---- operators ----

// Returns x as the preparation wants it. `per_channel` is any matrix with a row for each output channel.
Tensor check_x(const char* op, const Tensor& x, const Tensor& per_channel, const optional<Tensor>& bias) {
  TORCH_CHECK(per_channel.dim() == 2, op, ": weights and their scales must have a row per output channel");
  const int64_t n = per_channel.size(0);
  TORCH_CHECK(x.dim() == 2 && x.is_cpu() && x.is_floating_point() && x.size(1) > 0, op,
              ": x must be a floating-point CPU matrix [M, K], got ", x.scalar_type(), " ", x.sizes());
  TORCH_CHECK(!bias || (bias->is_cpu() && bias->scalar_type() == at::kFloat && bias->is_contiguous() &&
                        bias->sizes() == at::IntArrayRef({n})),
              op, ": bias must be contiguous float32 [", n, "]");
  return x.to(at::kFloat).contiguous();
}

void check_packed(const char* op, const Tensor& x, const Tensor& packed, const Tensor& w_scale, int64_t group) {
  const int64_t k = x.size(1), n = w_scale.size(0);
  TORCH_CHECK(group == k || (group > 0 && group < k && group % 4 == 0), op, ": group_size must be K = ", k,
              " or a smaller multiple of 4, got ", group);
  TORCH_CHECK(group <= kMaxGroup, op, ": group_size above ", kMaxGroup, " could overflow int32 sums");
  TORCH_CHECK(w_scale.is_cpu() && w_scale.scalar_type() == at::kFloat && w_scale.is_contiguous() &&
                  w_scale.sizes() == at::IntArrayRef({n, ceil_div(k, group)}),
              op, ": w_scale must be contiguous float32 [N, ", ceil_div(k, group), "], got ", w_scale.sizes());
  TORCH_CHECK(packed.is_cpu() && packed.scalar_type() == at::kChar && packed.is_contiguous() &&
                  packed.sizes() == at::IntArrayRef({ceil_div(n, 8), ceil_div(k, 4), 8, 4}),
              op, ": packed must come from pack_int8 of a weight [", n, ", ", k, "], got ", packed.sizes());
}

// int8 [N, K] -> int8 [ceil(N/8), ceil(K/4), 8, 4], see tiles.h. Refuses -128, which symmetric quantisation never
// produces: an inner loop for another instruction set may negate weights, and -128 has no negative.
Tensor pack_int8(const Tensor& w) {
  TORCH_CHECK(w.dim() == 2 && w.is_cpu() && w.scalar_type() == at::kChar && w.numel() > 0,
              "pack_int8: w must be a non-empty int8 CPU matrix [N, K], got ", w.scalar_type(), " ", w.sizes());
  TORCH_CHECK(w.min().item<int8_t>() > -128, "pack_int8: weights must lie in [-127, 127]");
  const int64_t n8 = ceil_div(w.size(0), 8), k4 = ceil_div(w.size(1), 4);
  const Tensor padded = at::constant_pad_nd(w, {0, k4 * 4 - w.size(1), 0, n8 * 8 - w.size(0)});
  return padded.contiguous().view({n8, 8, k4, 4}).transpose(1, 2).contiguous();
}

Tensor unpack_int8(const Tensor& packed, int64_t n, int64_t k) {
  TORCH_CHECK(packed.scalar_type() == at::kChar && n > 0 && k > 0 &&
                  packed.sizes() == at::IntArrayRef({ceil_div(n, 8), ceil_div(k, 4), 8, 4}),
              "unpack_int8: packed must be int8 from pack_int8 of a weight [", n, ", ", k, "], got ", packed.sizes());
  const Tensor padded = packed.transpose(1, 2).reshape({packed.size(0) * 8, packed.size(1) * 4});
  return padded.slice(0, 0, n).slice(1, 0, k).contiguous();
}

Tensor multiply_packed(const TileFn* tiles, const Tensor& rows, const Tensor* x_scale, int64_t k, const Tensor& packed,
                       const Tensor& w_scale, int64_t group, const optional<Tensor>& bias) {
  Tile tile{};
  tile.x = rows.const_data_ptr();
  tile.x_stride = rows.size(1);
  tile.k = k;
  tile.group = group;
  tile.x_scale = x_scale ? x_scale->const_data_ptr<float>() : nullptr;
  const int8_t* w = packed.const_data_ptr<int8_t>();
  const float* scales = w_scale.const_data_ptr<float>();
  const int64_t n = w_scale.size(0), groups = w_scale.size(1), block_bytes = packed.size(1) * 32;
  const int64_t row_bytes = rows.size(1) * static_cast<int64_t>(rows.element_size());
  return multiply(tiles, tile, row_bytes, rows.size(0), n, bias, [&](Tile& t, int64_t first, float* panel_scale) {
    t.w[0] = w + first / 8 * block_bytes;
    t.w[1] = t.channels > 8 ? w + (first / 8 + 1) * block_bytes : t.w[0];  // no second block: its sums are dropped
    for (int c = 0; c < t.channels; ++c)
      for (int64_t g = 0; g < groups; ++g) panel_scale[g * kChannels + c] = scales[(first + c) * groups + g];
  });
}

// float [M, K] -> float32 [M, N], activations quantised here, per row and `group` inputs. Sums of int8 products are
// exact within a group; groups are added in float32. A row with NaN or Inf gives NaN outputs.
Tensor int8_linear(const Tensor& x, const Tensor& packed, const Tensor& w_scale, int64_t group,
                   const optional<Tensor>& bias) {
  const Tensor rows = check_x("int8_linear", x, w_scale, bias);
  check_packed("int8_linear", x, packed, w_scale, group);
  const auto [q, x_scale] = quantize_rows(rows, group);
  return multiply_packed(active->int8, q, &x_scale, x.size(1), packed, w_scale, group, bias);
}

// The same with float32 activations. Meant for few rows: for many, a float32 GEMM over dequantised blocks is faster.
Tensor int8_weight_only_linear(const Tensor& x, const Tensor& packed, const Tensor& w_scale, int64_t group,
                               const optional<Tensor>& bias) {
  const Tensor rows = check_x("int8_weight_only_linear", x, w_scale, bias);
  check_packed("int8_weight_only_linear", x, packed, w_scale, group);
  return multiply_packed(active->weight_only, arrange_rows(rows, 4), nullptr, x.size(1), packed, w_scale, group, bias);
}

// bfloat16 weights [N, K] as they are, float32 activations and sums. Meant for few rows, like the one above.
Tensor bf16_linear(const Tensor& x, const Tensor& w, const optional<Tensor>& bias) {
  TORCH_CHECK(w.is_cpu() && w.scalar_type() == at::kBFloat16 && w.is_contiguous(),
              "bf16_linear: w must be a contiguous bfloat16 CPU matrix [N, K], got ", w.scalar_type(), " ", w.sizes());
  const Tensor checked = check_x("bf16_linear", x, w, bias);
  TORCH_CHECK(x.size(1) == w.size(1), "bf16_linear: x has ", x.size(1), " inputs, w has ", w.size(1));
  const Tensor rows = arrange_rows(checked, 16);
  Tile tile{};
  tile.x = rows.const_data_ptr();
  tile.x_stride = rows.size(1);
  tile.k = tile.group = w.size(1);
  const char* p = static_cast<const char*>(w.const_data_ptr());
  return multiply(active->bf16, tile, rows.size(1) * 4, x.size(0), w.size(0), bias,
                  [&](Tile& t, int64_t first, float*) { t.w[0] = p + first * t.k * 2; });
}

}  // namespace

TORCH_LIBRARY(tinyopt, m) {
  m.def("select_variant(str name) -> str", select_variant);  // for tests: every variant this CPU runs
  m.def("cpu_variant() -> str", [] { return std::string(active->name); });
  m.def("pack_int8(Tensor w) -> Tensor");
  m.def("unpack_int8(Tensor packed, int N, int K) -> Tensor");
  m.def("int8_linear(Tensor x, Tensor packed, Tensor w_scale, int group_size, Tensor? bias=None) -> Tensor");
  m.def(
      "int8_weight_only_linear(Tensor x, Tensor packed, Tensor w_scale, int group_size, Tensor? bias=None) -> Tensor");
  m.def("bf16_linear(Tensor x, Tensor w, Tensor? bias=None) -> Tensor");
  select_variant("");
}

TORCH_LIBRARY_IMPL(tinyopt, CPU, m) {
  m.impl("pack_int8", pack_int8);
  m.impl("unpack_int8", unpack_int8);
  m.impl("int8_linear", int8_linear);
  m.impl("int8_weight_only_linear", int8_weight_only_linear);
  m.impl("bf16_linear", bf16_linear);
}
