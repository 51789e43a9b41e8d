// Linear layers that read few bytes: int8 and int4 weights with int8 activations, int8 and bfloat16 with float ones.
//
// A decode step multiplies one row with every weight, so its time is the time to read the weights. A prefill
// multiplies hundreds of rows, so its time is arithmetic. Both walk over panels of 16 output channels (tiles.h): few rows
// pass over a panel while it lies in the cache, many go through the matrix units where the CPU has them (amx.h).
#include <ATen/Parallel.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <atomic>
#include <optional>
#include <string>
#include <vector>

#include "linear.h"
#include "variants.h"

namespace {

using at::Tensor;
using std::optional;

constexpr int64_t kMaxGroup = 131072;  // 127 * 127 * kMaxGroup still fits int32
constexpr int64_t kFewRows = 16;       // more go through the matrix units
constexpr int64_t kWorthAThread = 1 << 17;  // bytes of weights times rows that take longer than waking a thread

const Variant* active = nullptr;

// Makes the named variant the active one, or with "" the best that this CPU runs. Returns its name.
std::string select_variant(const std::string& name) {
  for (const Variant& v : kVariants) {
    if ((!name.empty() && name != v.name) || !v.supported()) continue;
    active = &v;
    return v.name;
  }
  TORCH_CHECK(false, "this CPU cannot run a variant named '", name, "'");
}

// ---- one multiplication ----

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
// halves that are dealt out beforehand wait for the slower thread, product after product.
template <class Work>
void share_panels(int64_t panels, int64_t bytes, const Work& work) {
  const int64_t threads = bytes < kWorthAThread ? 1 : at::get_num_threads(), share = std::max<int64_t>(1, panels / threads / 32);
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t first; (first = next.fetch_add(share)) < panels;) work(first, std::min(first + share, panels));
  });
}

void write_rows(const float* from, int64_t from_stride, int64_t rows, int64_t channels, const float* bias, float* y,
                int64_t n) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < channels; ++c) y[r * n + c] = from[r * from_stride + c] + (bias ? bias[c] : 0.f);
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

#if defined(HAVE_AMX)
// 32 rows of tiles for every 32 rows or part of them.
Rows tiled_rows(const Tensor& x, int64_t group, at::ScalarType dtype) {
  const int64_t m = x.size(0), k = x.size(1), padded = ceil_div(m, kBlockRows) * kBlockRows, groups = ceil_div(k, group);
  const int64_t a_tile = 64 / static_cast<int64_t>(c10::elementSize(dtype)), steps = ceil_div(k, a_tile);
  Rows rows{at::zeros({padded, steps * a_tile}, dtype), {}, {}, m};
  float *scales = nullptr, *sums = nullptr;
  if (dtype == at::kChar) {
    rows.scale = at::zeros({padded, groups}, at::kFloat);
    rows.sum = at::zeros({padded, groups}, at::kFloat);
    scales = rows.scale.mutable_data_ptr<float>();
    sums = rows.sum.mutable_data_ptr<float>();
  }
  const float* from = x.const_data_ptr<float>();
  char* to = static_cast<char*>(rows.x.mutable_data_ptr());
  at::parallel_for(0, m, ceil_div(32768, k), [&](int64_t begin, int64_t end) {
    std::vector<char> row(steps * 64);
    for (int64_t r = begin; r < end; ++r) {
      if (scales) {
        std::fill(row.begin(), row.end(), 0);  // a group of zeros is not written
        active->quantize(from + r * k, k, group, row.data(), scales + r * groups, sums + r * groups);
      } else {
        std::copy_n(from + r * k, k, reinterpret_cast<at::BFloat16*>(row.data()));
      }
      cut_row(row.data(), r, steps, to);
    }
  });
  return rows;
}

enum class Expand { kNot, kInt4, kInt8 };

// Many rows: pairs of panels, expanded to what the matrix units take, times 32 rows at a time.
Tensor multiply_many(void (*block)(const Block&), Expand expand, const Rows& rows, const Weight& w,
                     const optional<Tensor>& bias) {
  Tensor out = at::empty({rows.m, w.n}, at::kFloat);
  float* y = out.mutable_data_ptr<float>();
  const float* bias_data = bias.has_value() ? bias->const_data_ptr<float>() : nullptr;
  const int64_t groups = w.groups(), expanded_bytes = expand == Expand::kNot ? 0 : 2 * w.panel_bytes;
  const bool scale_in_weights = expand == Expand::kInt8 && groups > 1;
  share_panels(ceil_div(w.panels(), kPair), w.panels() * w.panel_bytes * rows.m, [&](int64_t begin, int64_t end) {
    const Tiles tiles;
    const Tensor scratch = at::empty({kPair * expanded_bytes + 64}, at::kByte);
    alignas(64) float result[kBlockRows * kPair * kChannels];
    Block b{};
    b.steps = rows.row_bytes() / 64;
    b.k = w.k;
    b.group = w.group;
    b.out = result;
    for (int64_t pair = begin; pair < end; ++pair) {
      b.panels = static_cast<int>(std::min<int64_t>(kPair, w.panels() - pair * kPair));
      for (int i = 0; i < b.panels; ++i) {
        const int64_t panel = pair * kPair + i, offset = panel * groups * kChannels;
        const uint16_t* scale = w.scale ? w.scale + offset : nullptr;
        b.w_scale[i] = scale_in_weights ? nullptr : scale;
        b.w_min[i] = w.minimum ? w.minimum + offset : nullptr;
        b.w[i] = w.data + panel * w.panel_bytes;
        if (expand == Expand::kNot) continue;
        char* to = static_cast<char*>(scratch.mutable_data_ptr()) + i * expanded_bytes;
        if (expand == Expand::kInt4) expand_int4(b.w[i], w.panel_bytes / 64, to);
        else expand_int8(b.w[i], w.panel_bytes / 64, scale_in_weights ? scale : nullptr, w.group, to);
        b.w[i] = to;
      }
      const int64_t first = pair * kPair * kChannels, blocks = ceil_div(rows.m, kBlockRows);
      const int64_t steps = b.steps * (rows.scale.defined() ? 4 : 1);  // int8 tiles take their turns one by one
      b.next_lines = pair + 1 < end ? ceil_div(kPair * w.panel_bytes / 64, blocks * steps) : 0;
      for (int64_t row = 0; row < rows.m; row += kBlockRows) {
        b.next = w.data + (pair + 1) * kPair * w.panel_bytes + row / kBlockRows * steps * b.next_lines * 64;
        b.x = static_cast<const char*>(rows.x.const_data_ptr()) + row * rows.row_bytes();
        if (rows.scale.defined()) {
          b.x_scale = rows.scale.const_data_ptr<float>() + row * groups;
          b.x_sum = rows.sum.const_data_ptr<float>() + row * groups;
        }
        block(b);
        write_rows(result, kPair * kChannels, std::min<int64_t>(kBlockRows, rows.m - row),
                   std::min<int64_t>(kPair * kChannels, w.n - first), bias_data ? bias_data + first : nullptr,
                   y + row * w.n + first, w.n);
      }
    }
  });
  return out;
}
#endif

bool use_matrix_units(int64_t m) { return active->matrix_units && m > kFewRows; }

// ---- arguments ----

Tensor check_x(const char* op, const Tensor& x, int64_t n, const optional<Tensor>& bias) {
  TORCH_CHECK(x.dim() == 2 && x.is_cpu() && x.is_floating_point() && x.size(1) > 0, op,
              ": x must be a floating-point CPU matrix [M, K], got ", x.scalar_type(), " ", x.sizes());
  TORCH_CHECK(!bias || (bias->is_cpu() && bias->scalar_type() == at::kFloat && bias->is_contiguous() &&
                        bias->sizes() == at::IntArrayRef({n})),
              op, ": bias must be contiguous float32 [", n, "]");
  return x.to(at::kFloat).contiguous();
}

// `inputs_a_line` inputs of 16 channels are 64 bytes; panels are padded to 64 inputs.
Weight check_weight(const char* op, const Tensor& x, const Tensor& packed, int64_t n, int64_t inputs_a_line,
                    at::ScalarType dtype) {
  const int64_t k = x.size(1), panels = ceil_div(n, kChannels), lines = ceil_div(k, 64) * 64 / inputs_a_line;
  const int64_t elements = 4 / static_cast<int64_t>(c10::elementSize(dtype));
  TORCH_CHECK(n > 0 && packed.is_cpu() && packed.scalar_type() == dtype && packed.is_contiguous() &&
                  packed.sizes() == at::IntArrayRef({panels, lines, kChannels, elements}),
              op, ": packed must be contiguous ", dtype, " [", panels, ", ", lines, ", 16, ", elements,
              "] for a weight [", n, ", ", k, "], got ", packed.sizes());
  return {static_cast<const char*>(packed.const_data_ptr()), lines * 64, n, k, k, nullptr, nullptr};
}

const uint16_t* check_scale(const char* op, const Tensor& scale, const Weight& w) {
  TORCH_CHECK(w.group == w.k || (w.group > 0 && w.group < w.k && w.group % 4 == 0), op, ": group_size must be K = ", w.k,
              " or a smaller multiple of 4, got ", w.group);
  TORCH_CHECK(w.group <= kMaxGroup, op, ": group_size above ", kMaxGroup, " could overflow int32 sums");
  TORCH_CHECK(scale.is_cpu() && scale.scalar_type() == at::kBFloat16 && scale.is_contiguous() &&
                  scale.sizes() == at::IntArrayRef({w.panels(), w.groups(), kChannels}),
              op, ": scales must be contiguous bfloat16 [", w.panels(), ", ", w.groups(), ", 16], got ", scale.sizes());
  return static_cast<const uint16_t*>(scale.const_data_ptr());
}

// The extra 64 bytes keep rows of 2^n inputs off the same cache sets.
Rows int8_rows(const Tensor& x, int64_t group) {
  const int64_t m = x.size(0), k = x.size(1), groups = ceil_div(k, group), width = ceil_div(k, 64) * 64 + 64;
  Rows rows{at::zeros({m, width}, active->int8_rows), at::empty({m, groups}, at::kFloat),
            at::empty({m, groups}, at::kFloat), m};
  const float* from = x.const_data_ptr<float>();
  float *scales = rows.scale.mutable_data_ptr<float>(), *sums = rows.sum.mutable_data_ptr<float>();
  char* to = static_cast<char*>(rows.x.mutable_data_ptr());
  at::parallel_for(0, m, ceil_div(32768, k), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      active->quantize(from + r * k, k, group, to + r * rows.row_bytes(), scales + r * groups, sums + r * groups);
  });
  return rows;
}

// float32 rows as the inner loops want them: an even number of inputs, or a multiple of four.
Rows float_rows(const Tensor& x, int64_t multiple) {
  const int64_t missing = ceil_div(x.size(1), multiple) * multiple - x.size(1);
  return {missing ? at::constant_pad_nd(x, {0, missing}) : x, {}, {}, x.size(0)};
}

}  // namespace

// ---- operators: x float [M, K] -> float32 [M, N] ----

// Activations are quantised here, per row and `group` inputs. Sums of int8 products are exact within a group; groups are
// added in float32. A row with NaN or Inf gives NaN outputs. packed int8 [P, ceil(K/64)*16, 16, 4], scale [P, G, 16].
Tensor int8_linear(const Tensor& x, const Tensor& packed, const Tensor& scale, int64_t n, int64_t group,
                   const optional<Tensor>& bias) {
  const Tensor checked = check_x("int8_linear", x, n, bias);
  Weight w = check_weight("int8_linear", x, packed, n, 4, at::kChar);
  w.group = group;
  w.scale = check_scale("int8_linear", scale, w);
#if defined(HAVE_AMX)
  if (use_matrix_units(x.size(0)) && (group % 64 == 0 || group == w.k))
    return multiply_many(int8_block, Expand::kNot, tiled_rows(checked, group, at::kChar), w, bias);
#endif
  return multiply_few(active->int8, int8_rows(checked, group), w, bias);
}

// The same for codes 0..15: weight = code * scale + minimum. packed uint8 [P, ceil(K/64)*8, 16, 4].
Tensor int4_linear(const Tensor& x, const Tensor& packed, const Tensor& scale, const Tensor& minimum, int64_t n,
                   int64_t group, const optional<Tensor>& bias) {
  const Tensor checked = check_x("int4_linear", x, n, bias);
  Weight w = check_weight("int4_linear", x, packed, n, 8, at::kByte);
  TORCH_CHECK(group % 8 == 0 || group == w.k, "int4_linear: group_size must be K or a multiple of 8, got ", group);
  w.group = group;
  w.scale = check_scale("int4_linear", scale, w);
  w.minimum = check_scale("int4_linear", minimum, w);
#if defined(HAVE_AMX)
  if (use_matrix_units(x.size(0)) && (group % 64 == 0 || group == w.k))
    return multiply_many(int8_block, Expand::kInt4, tiled_rows(checked, group, at::kChar), w, bias);
#endif
  return multiply_few(active->int4, int8_rows(checked, group), w, bias);
}

// int8 weights, float32 activations; the matrix units round them to bfloat16.
Tensor int8_weight_only_linear(const Tensor& x, const Tensor& packed, const Tensor& scale, int64_t n, int64_t group,
                               const optional<Tensor>& bias) {
  const Tensor checked = check_x("int8_weight_only_linear", x, n, bias);
  Weight w = check_weight("int8_weight_only_linear", x, packed, n, 4, at::kChar);
  w.group = group;
  w.scale = check_scale("int8_weight_only_linear", scale, w);
#if defined(HAVE_AMX)
  if (use_matrix_units(x.size(0)))
    return multiply_many(bf16_block, Expand::kInt8, tiled_rows(checked, w.k, at::kBFloat16), w, bias);
#endif
  return multiply_few(active->weight_only, float_rows(checked, 4), w, bias);
}

// bfloat16 weights, packed [P, ceil(K/64)*32, 16, 2]; float32 activations, which the matrix units round to bfloat16.
Tensor bf16_linear(const Tensor& x, const Tensor& packed, int64_t n, const optional<Tensor>& bias) {
  const Tensor checked = check_x("bf16_linear", x, n, bias);
  const Weight w = check_weight("bf16_linear", x, packed, n, 2, at::kBFloat16);
#if defined(HAVE_AMX)
  if (use_matrix_units(x.size(0)))
    return multiply_many(bf16_block, Expand::kNot, tiled_rows(checked, w.k, at::kBFloat16), w, bias);
#endif
  return multiply_few(active->bf16, float_rows(checked, 2), w, bias);
}

Isa active_isa() { return active->isa; }

TORCH_LIBRARY(tinyopt, m) {
  m.def("select_variant(str name) -> str", select_variant);  // for tests: every variant this CPU runs
  m.def("cpu_variant() -> str", [] { return std::string(active->name); });
  m.def("int8_linear(Tensor x, Tensor packed, Tensor scale, int N, int group_size, Tensor? bias=None) -> Tensor");
  m.def(
      "int8_weight_only_linear(Tensor x, Tensor packed, Tensor scale, int N, int group_size, Tensor? bias=None) -> Tensor");
  m.def(
      "int4_linear(Tensor x, Tensor packed, Tensor scale, Tensor minimum, int N, int group_size, Tensor? bias=None) "
      "-> Tensor");
  m.def("bf16_linear(Tensor x, Tensor packed, int N, Tensor? bias=None) -> Tensor");
  select_variant("");
}

TORCH_LIBRARY_IMPL(tinyopt, CPU, m) {
  m.impl("int8_linear", int8_linear);
  m.impl("int8_weight_only_linear", int8_weight_only_linear);
  m.impl("int4_linear", int4_linear);
  m.impl("bf16_linear", bf16_linear);
}
