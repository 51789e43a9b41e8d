// What a decoder layer does around its products and its attention, and the layer as one operator.
//
// Each part would be several small operators in PyTorch, and at one token a step the calls themselves are what takes time.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <optional>

#include "attention.h"
#include "linear.h"
#include "vector.h"

namespace {

using at::Tensor;
using std::optional;

template <class V>
INLINE_BODY void norm_rows(float* x, const float* add, const float* w, int64_t h, float eps, int64_t begin, int64_t end, float* y) {
  for (int64_t r = begin; r < end; ++r) {
    float *row = x + r * h, *out = y + r * h;
    if (add)
      for (int64_t i = 0; i < h; ++i) row[i] += add[r * h + i];
    V numbers, squares = {};
    int64_t i = 0;
    for (; i + kWidth<V> <= h; i += kWidth<V>) {
      read(numbers, row + i);
      squares += numbers * numbers;
    }
    float sum = 0.f;
    for (; i < h; ++i) sum += row[i] * row[i];
    for (int64_t lane = 0; lane < kWidth<V>; ++lane) sum += squares[lane];
    const float scale = 1.f / std::sqrt(sum / static_cast<float>(h) + eps);
    for (i = 0; i < h; ++i) out[i] = w[i] * (row[i] * scale);
  }
}
#if defined(__x86_64__)
TARGET_AVX512 void norm_avx512(float* x, const float* add, const float* w, int64_t h, float eps, int64_t b, int64_t e, float* y) {
  norm_rows<Vec>(x, add, w, h, eps, b, e, y);
}
TARGET_AVX2 void norm_avx2(float* x, const float* add, const float* w, int64_t h, float eps, int64_t b, int64_t e, float* y) {
  norm_rows<Vec8>(x, add, w, h, eps, b, e, y);
}
#endif

// residual float32 [..., H] becomes residual + update; returns its RMSNorm times weight [H].
Tensor add_rms_norm(const Tensor& residual, const optional<Tensor>& update, const Tensor& weight, double eps) {
  const int64_t h = weight.numel();
  TORCH_CHECK(h > 0 && residual.dim() > 0 && residual.size(-1) == h && weight.is_contiguous() &&
                  residual.scalar_type() == at::kFloat && residual.is_contiguous() && weight.scalar_type() == at::kFloat &&
                  (!update || (update->scalar_type() == at::kFloat && update->is_contiguous() &&
                                                            update->numel() == residual.numel())),
              "add_rms_norm: residual, update and weight must be contiguous float32");
  const int64_t m = residual.numel() / h;
  Tensor out = at::empty(residual.sizes(), at::kFloat);
  float *x = residual.mutable_data_ptr<float>(), *y = out.mutable_data_ptr<float>(), e = static_cast<float>(eps);
  const float *add = update ? update->const_data_ptr<float>() : nullptr, *w = weight.const_data_ptr<float>();
  at::parallel_for(0, m, 16, [&](int64_t begin, int64_t end) {
#if defined(__x86_64__)
    if (active_isa() == Isa::kAvx512) return norm_avx512(x, add, w, h, e, begin, end, y);
    if (active_isa() == Isa::kAvx2) return norm_avx2(x, add, w, h, e, begin, end, y);
#endif
    norm_rows<Vec4>(x, add, w, h, e, begin, end, y);
  });
  return out;
}

struct Strided {  // rows of floats, `stride` of them from one to the next
  const float* data;
  int64_t stride;
};

INLINE_BODY void silu_mul_rows(Strided gates, Strided ups, int64_t width, int64_t begin, int64_t end, float* to) {
  for (int64_t r = begin; r < end; ++r) {
    const float *gate = gates.data + r * gates.stride, *up = ups.data + r * ups.stride;
    for (int64_t i = 0; i < width; ++i) {
      const float e = fast_exp(-std::abs(gate[i])), sigmoid = (gate[i] < 0.f ? e : 1.f) / (1.f + e);
      to[r * width + i] = gate[i] * sigmoid * up[i];
    }
  }
}
#if defined(__x86_64__)
TARGET_AVX512 void silu_mul_avx512(Strided g, Strided u, int64_t n, int64_t b, int64_t e, float* y) {
  silu_mul_rows(g, u, n, b, e, y);
}
TARGET_AVX2 void silu_mul_avx2(Strided g, Strided u, int64_t n, int64_t b, int64_t e, float* y) {
  silu_mul_rows(g, u, n, b, e, y);
}
#endif

// silu(gate) * up, contiguous; gate and up float32 [..., I], whole tensors or the halves of one.
Tensor silu_mul(const Tensor& gate, const Tensor& up) {
  TORCH_CHECK(gate.scalar_type() == at::kFloat && up.scalar_type() == at::kFloat && gate.sizes() == up.sizes() &&
                  gate.dim() > 0 && gate.stride(-1) == 1 && up.stride(-1) == 1,
              "silu_mul: gate and up must be float32 [..., I] of one shape, their last axis without gaps");
  const int64_t width = gate.size(-1), m = width ? gate.numel() / width : 0;
  Tensor out = at::empty(gate.sizes(), at::kFloat);
  const Tensor gate_rows = gate.reshape({m, width}), up_rows = up.reshape({m, width});
  const Strided g{gate_rows.const_data_ptr<float>(), gate_rows.stride(0)};
  const Strided u{up_rows.const_data_ptr<float>(), up_rows.stride(0)};
  float* y = out.mutable_data_ptr<float>();
  at::parallel_for(0, m, 16, [&](int64_t begin, int64_t end) {
#if defined(__x86_64__)
    if (active_isa() == Isa::kAvx512) return silu_mul_avx512(g, u, width, begin, end, y);
    if (active_isa() == Isa::kAvx2) return silu_mul_avx2(g, u, width, begin, end, y);
#endif
    silu_mul_rows(g, u, width, begin, end, y);
  });
  return out;
}

// ---- a whole layer ----

enum Kind : int64_t { kInt8, kInt8WeightOnly, kInt4, kBFloat16 };

// residual float32 [B, T, H] of the newest T tokens goes through one decoder layer, in place. Products in their order: qkv,
// o, gate_up, down; `scales` and `minimums` as their `kinds` want them; `outputs` and `groups` a number each.
void decoder_layer(const Tensor& residual, at::TensorList norms, at::TensorList packed,
                   const c10::List<optional<Tensor>>& scales, const c10::List<optional<Tensor>>& minimums,
                   at::IntArrayRef kinds, at::IntArrayRef outputs, at::IntArrayRef groups, const Tensor& cos,
                   const Tensor& sin, const Tensor& keys, const Tensor& values, const optional<Tensor>& key_scale,
                   const optional<Tensor>& value_scale, int64_t past, double scaling, double eps,
                   const optional<Tensor>& kv_of_head) {
  TORCH_CHECK(residual.dim() == 3 && norms.size() == 2 && packed.size() == 4 && scales.size() == 4 && minimums.size() == 4 &&
                  kinds.size() == 4 && outputs.size() == 4 && groups.size() == 4,
              "decoder_layer: residual [B, T, H], two norms and four products are needed");
  const int64_t batch = residual.size(0), tokens = residual.size(1);
  const auto product = [&](size_t i, const Tensor& x) {
    const Tensor rows = x.reshape({batch * tokens, -1});
    if (kinds[i] == kBFloat16) return bf16_linear(rows, packed[i], outputs[i], {});
    const Tensor scale = scales.get(i).value();
    if (kinds[i] == kInt8) return int8_linear(rows, packed[i], scale, outputs[i], groups[i], {});
    if (kinds[i] == kInt8WeightOnly) return int8_weight_only_linear(rows, packed[i], scale, outputs[i], groups[i], {});
    return int4_linear(rows, packed[i], scale, minimums.get(i).value(), outputs[i], groups[i], {});
  };
  const Tensor qkv = product(0, add_rms_norm(residual, {}, norms[0], eps)).view({batch, tokens, outputs[0]});
  const Tensor q = rope_append(qkv, cos, sin, keys, values, key_scale, value_scale, past);
  const Tensor attended = attend(q, keys, values, key_scale, value_scale, past + tokens, scaling, kv_of_head);
  const Tensor inputs = add_rms_norm(residual, product(1, attended), norms[1], eps);
  const std::vector<Tensor> halves = product(2, inputs).chunk(2, -1);
  TORCH_CHECK(halves.size() == 2, "decoder_layer: gate and up come as one product of an even width");
  const Tensor down = product(3, silu_mul(halves[0], halves[1]));
  TORCH_CHECK(down.numel() == residual.numel(), "decoder_layer: down must be as wide as the residual stream");
  float* x = residual.mutable_data_ptr<float>();
  const float* add = down.const_data_ptr<float>();
  for (int64_t i = 0; i < residual.numel(); ++i) x[i] += add[i];
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tinyopt, m) {
  m.def("add_rms_norm(Tensor(a!) residual, Tensor? update, Tensor weight, float eps) -> Tensor");
  m.def("silu_mul(Tensor gate, Tensor up) -> Tensor");
  m.def(
      "rope_append(Tensor qkv, Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values, Tensor(c!)? key_scale, "
      "Tensor(d!)? value_scale, int past) -> Tensor");
  m.def(
      "attend(Tensor q, Tensor keys, Tensor values, Tensor? key_scale, Tensor? value_scale, int length, float scaling, "
      "Tensor? kv_of_head=None) -> Tensor");
  m.def(
      "attend_prompt(Tensor q, Tensor keys, Tensor values, Tensor? key_scale, Tensor? value_scale, int length, float scaling, "
      "Tensor? kv_of_head=None) -> Tensor");
  m.def(
      "decoder_layer(Tensor(a!) residual, Tensor[] norms, Tensor[] packed, Tensor?[] scales, Tensor?[] minimums, "
      "int[] kinds, int[] outputs, int[] groups, Tensor cos, Tensor sin, Tensor(b!) keys, Tensor(c!) values, "
      "Tensor(d!)? key_scale, Tensor(e!)? value_scale, int past, float scaling, float eps, Tensor? kv_of_head=None) -> ()");
}

TORCH_LIBRARY_IMPL(tinyopt, CPU, m) {
  m.impl("add_rms_norm", add_rms_norm);
  m.impl("silu_mul", silu_mul);
  m.impl("rope_append", rope_append);
  m.impl("attend", attend);
  m.impl("attend_prompt", attend_prompt);
  m.impl("decoder_layer", decoder_layer);
}
