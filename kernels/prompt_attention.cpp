// Attention of a prompt: many query rows, each over the keys up to its own.
//
// attention.cpp lays out a block of the cache for the few rows that a token and its drafts have, and forgets it. For a prompt
// all keys are laid side by side in sixteens first, once for all rows and all query heads that read them.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <cmath>
#include <vector>

#include "attention.h"
#include "rows.h"

namespace {

using at::Tensor;
using std::optional;

int64_t score_row(int64_t length) { return padded(length) + kLanes; }  // rows of 2^n scores would share a cache set

struct Prompt {
  const float* q;                          // [B, T, Hq, d]
  const float *keys, *values;              // [B, Hkv, padded length / 16, d, 16], scaled; [B, Hkv, length, padded d]
  int64_t rows, heads, kv_heads, d, length;  // the last row sees `length` keys
  std::vector<int64_t> kv_head;            // of each query head
  float* out;                              // [B, T, Hq, d]
};

// R query rows from `first` on, of one head. `room` holds R rows of scores and R of results.
template <class V, int R, int C>
INLINE_BODY void attend_rows(const Prompt& a, int64_t b, int64_t head, int64_t first, float* room) {
  const int64_t count = std::min<int64_t>(R, a.rows - first), width = padded(a.length), d_padded = padded(a.d);
  const int64_t before = a.length - a.rows + first, seen = before + count, kv = b * a.kv_heads + a.kv_head[head];
  const float *keys = a.keys + kv * width * a.d, *values = a.values + kv * a.length * d_padded;
  const int64_t row = score_row(a.length);
  float *scores = room, *result = scores + R * row;
  const float *q[R], *p[R];
  for (int64_t r = 0; r < R; ++r) {  // rows after the last repeat it, and are not written
    q[r] = a.q + ((b * a.rows + first + std::min(r, count - 1)) * a.heads + head) * a.d;
    p[r] = scores + r * row;
  }
  constexpr int64_t columns = C * kWidth<V>;
  const int64_t next_keys = kWidth<V> == kLanes ? a.d * kLanes : kWidth<V>;  // in the next sixteen, or in the same
  for (int64_t j = 0; j < seen; j += columns)
    multiply<V, R, C>(q, keys + j * a.d, kLanes, next_keys, a.d, scores + j, row);
  float total[R];
  for (int64_t r = 0; r < count; ++r) {
    float* of_row = scores + r * row;
    total[r] = exponentials<V>(of_row, before + r + 1, largest_of<V>(of_row, before + r + 1));
    std::fill(of_row + before + r + 1, of_row + seen, 0.f);
  }
  for (int64_t n = 0; n < d_padded; n += columns)
    multiply<V, R, C>(p, values + n, d_padded, kWidth<V>, seen, result + n, d_padded);
  for (int64_t r = 0; r < count; ++r) {
    float* y = a.out + ((b * a.rows + first + r) * a.heads + head) * a.d;
    for (int64_t n = 0; n < a.d; ++n) y[n] = result[r * d_padded + n] / total[r];
  }
}

using RowsFn = void (*)(const Prompt&, int64_t, int64_t, int64_t, float*);
struct Rows {
  int64_t count;  // of one call: as many as there are registers for their sums
  RowsFn fn;
};
void rows_portable(const Prompt& a, int64_t b, int64_t h, int64_t r, float* room) { attend_rows<Vec4, 2, 4>(a, b, h, r, room); }
#if defined(__x86_64__)
TARGET_AVX2 void rows_avx2(const Prompt& a, int64_t b, int64_t h, int64_t r, float* room) {
  attend_rows<Vec8, 6, 2>(a, b, h, r, room);
}
TARGET_AVX512 void rows_avx512(const Prompt& a, int64_t b, int64_t h, int64_t r, float* room) {
  attend_rows<Vec, 8, 2>(a, b, h, r, room);
}
#endif

Rows rows_fn() {
#if defined(__x86_64__)
  if (active_isa() == Isa::kAvx512) return {8, rows_avx512};
  if (active_isa() == Isa::kAvx2) return {6, rows_avx2};
#endif
  return {2, rows_portable};
}

// Keys times `scaling` and their scale, in sixteens; values times theirs. What pads them is zero.
template <class KV>
void lay_out(const Tensor& keys, const Tensor& values, const optional<Tensor>& key_scale, const optional<Tensor>& value_scale,
             int64_t length, float scaling, float* to_keys, float* to_values) {
  const int64_t capacity = keys.size(2), d = keys.size(3), width = padded(length), d_padded = padded(d);
  const auto *from_k = static_cast<const KV*>(keys.const_data_ptr()), *from_v = static_cast<const KV*>(values.const_data_ptr());
  const float* k_scales = key_scale ? key_scale->const_data_ptr<float>() : nullptr;
  const float* v_scales = value_scale ? value_scale->const_data_ptr<float>() : nullptr;
  at::parallel_for(0, keys.size(0) * keys.size(1) * width / kLanes, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t kv = i * kLanes / width, token = i * kLanes % width, count = std::clamp<int64_t>(length - token, 0, kLanes);
      float* panel = to_keys + i * kLanes * d;
      if (count < kLanes) std::fill_n(panel, kLanes * d, 0.f);
      for (int64_t j = 0; j < count; ++j) {
        const int64_t place = kv * capacity + token + j;
        const float k_scale = scaling * (k_scales ? k_scales[place] : 1.f), v_scale = v_scales ? v_scales[place] : 1.f;
        float* row = to_values + (kv * length + token + j) * d_padded;
        for (int64_t n = 0; n < d; ++n) panel[n * kLanes + j] = widened(from_k[place * d + n]) * k_scale;
        for (int64_t n = 0; n < d; ++n) row[n] = widened(from_v[place * d + n]) * v_scale;
        std::fill(row + d, row + d_padded, 0.f);
      }
    }
  });
}

}  // namespace

// As `attend`, in another order of sums.
Tensor attend_prompt(const Tensor& q, const Tensor& keys, const Tensor& values, const optional<Tensor>& key_scale,
                     const optional<Tensor>& value_scale, int64_t length, double scaling, const optional<Tensor>& kv_of_head) {
  check_attention("attend_prompt", q, keys, values, key_scale, value_scale, length);
  const int64_t batch = q.size(0), heads = q.size(2), kv_heads = keys.size(1), d = q.size(3);
  const Tensor panels = at::empty({batch * kv_heads * padded(length) * d}, at::kFloat);
  const Tensor wide = at::empty({batch * kv_heads * length * padded(d)}, at::kFloat);
  const auto layout = keys.scalar_type() == at::kFloat ? lay_out<float>
                      : keys.scalar_type() == at::kChar ? lay_out<int8_t> : lay_out<uint16_t>;
  layout(keys, values, key_scale, value_scale, length, static_cast<float>(scaling), panels.mutable_data_ptr<float>(),
         wide.mutable_data_ptr<float>());
  Tensor out = at::empty({batch, q.size(1), heads * d}, at::kFloat);
  const Prompt a{q.const_data_ptr<float>(), panels.const_data_ptr<float>(),
                 wide.const_data_ptr<float>(), q.size(1), heads, kv_heads, d, length,
                 kv_heads_of("attend_prompt", kv_of_head, heads, kv_heads), out.mutable_data_ptr<float>()};
  const Rows rows = rows_fn();
  const int64_t blocks = (a.rows + rows.count - 1) / rows.count;
  at::parallel_for(0, batch * heads * blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> room(rows.count * (score_row(length) + padded(d)));
    for (int64_t task = begin; task < end; ++task)
      rows.fn(a, task / blocks / heads, task / blocks % heads, task % blocks * rows.count, room.data());
  });
  return out;
}
