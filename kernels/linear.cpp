// Linear layers that read few bytes: int8 and int4 weights with int8 activations, int8 and bfloat16 with float ones.
//
// A decode step multiplies one row with every weight, so its time is the time to read the weights (few_rows.h). A prefill
// multiplies hundreds of rows, so its time is arithmetic (many_rows.h). Both walk over panels of 16 output channels
// (tiles.h). Here: the operators, what they check, and the choice between the two.
#include <torch/library.h>

#include <string>

#include "linear.h"
#include "many_rows.h"

namespace {

constexpr int64_t kMaxGroup = 131072;  // 127 * 127 * kMaxGroup still fits int32

// Makes the named variant the active one, or with "" the best that this CPU runs. Returns its name.
std::string select_variant(const std::string& name) {
  for (const Variant& v : kVariants) {
    if ((!name.empty() && name != v.name) || !v.supported()) continue;
    active = &v;
    return v.name;
  }
  TORCH_CHECK(false, "this CPU cannot run a variant named '", name, "'");
}

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
  if (auto* many = loops_for(Kind::kInt8, x.size(0), w)) return multiply_many(*many, Kind::kInt8, checked, w, bias);
  return multiply_few(active->int8, int8_rows(active->for_int8, checked, group), w, bias);
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
  if (auto* many = loops_for(Kind::kInt4, x.size(0), w)) return multiply_many(*many, Kind::kInt4, checked, w, bias);
  return multiply_few(active->int4, int8_rows(active->for_int4, checked, group), w, bias);
}

// int8 weights, float32 activations. Many rows are rounded to bfloat16 where the CPU multiplies that.
Tensor int8_weight_only_linear(const Tensor& x, const Tensor& packed, const Tensor& scale, int64_t n, int64_t group,
                               const optional<Tensor>& bias) {
  const Tensor checked = check_x("int8_weight_only_linear", x, n, bias);
  Weight w = check_weight("int8_weight_only_linear", x, packed, n, 4, at::kChar);
  w.group = group;
  w.scale = check_scale("int8_weight_only_linear", scale, w);
  const Kind kind = Kind::kInt8WeightOnly;
  if (auto* many = loops_for(kind, x.size(0), w)) return multiply_many(*many, kind, checked, w, bias);
  return multiply_few(active->weight_only, float_rows(checked, 4), w, bias);
}

// bfloat16 weights, packed [P, ceil(K/64)*32, 16, 2]; float32 activations, rounded as above.
Tensor bf16_linear(const Tensor& x, const Tensor& packed, int64_t n, const optional<Tensor>& bias) {
  const Tensor checked = check_x("bf16_linear", x, n, bias);
  const Weight w = check_weight("bf16_linear", x, packed, n, 2, at::kBFloat16);
  if (auto* many = loops_for(Kind::kBFloat16, x.size(0), w)) return multiply_many(*many, Kind::kBFloat16, checked, w, bias);
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
