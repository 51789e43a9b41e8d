// Attention of a prompt: many query rows, each over the keys up to its own.
//
// attention.cpp takes one query row after the other, which is right for a token and its drafts, where reading the cache is the
// limit. Of a prompt arithmetic is: here several rows take two times sixteen keys together, so that sums hide each other's
// latency and each line that is read serves all of them. Keys are first laid side by side in sixteens, once for all rows and
// all query heads that read them.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <cmath>
#include <vector>

#include "attention.h"
#include "vector.h"

namespace {

using at::Tensor;
using std::optional;

constexpr int64_t kColumns = 2 * kLanes;  // keys, and numbers of a value, are padded to so many

int64_t padded(int64_t n) { return (n + kColumns - 1) / kColumns * kColumns; }

int64_t score_row(int64_t length) { return padded(length) + kLanes; }  // rows of 2^n scores would share a cache set

struct Prompt {
  const float* q;                          // [B, T, Hq, d]
  const float *keys, *values;              // [B, Hkv, padded length / 16, d, 16], scaled; [B, Hkv, length, padded d]
  int64_t rows, heads, kv_heads, d, length;  // the last row sees `length` keys
  std::vector<int64_t> kv_head;            // of each query head
  float* out;                              // [B, T, Hq, d]
};

// Vectors as wide as the registers: GCC keeps wider ones in memory.
typedef float Vec8 __attribute__((vector_size(32)));
typedef float Vec4 __attribute__((vector_size(16)));
template <class V>
constexpr int64_t kWidth = sizeof(V) / sizeof(float);
template <class V>
INLINE_BODY void read(V& v, const float* p) { std::memcpy(&v, p, sizeof v); }

// R rows of `a` times C vectors of columns of `b`: out[r][c] = sum of a[r][i] * b[i][c] over i < k.
template <class V, int R, int C>
INLINE_BODY void multiply(const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t b_vector, int64_t k, float* out,
                          int64_t out_row) {
  V sum[R][C] = {};
  for (int64_t i = 0; i < k; ++i) {
    V columns[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) read(columns[c], b + i * b_row + c * b_vector);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sum[r][c] += a[r * a_row + i] * columns[c];
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) std::memcpy(out + r * out_row + c * kWidth<V>, &sum[r][c], sizeof(V));
}

// `count` scores, with room for a multiple of 16, become exp(score - largest), what follows zero. Returns their sum.
template <class V>
INLINE_BODY float exponentials(float* p, int64_t count) {
  const int64_t end = (count + kLanes - 1) / kLanes * kLanes;
  std::fill(p + count, p + end, p[0]);
  V most, v, sums = {};
  read(most, p);
  for (int64_t j = kWidth<V>; j < end; j += kWidth<V>) {
    read(v, p + j);
    most = v > most ? v : most;
  }
  float largest = most[0], total = 0.f;
  for (int64_t lane = 1; lane < kWidth<V>; ++lane) largest = std::max(largest, most[lane]);
  for (int64_t j = 0; j < end; ++j) p[j] = fast_exp(p[j] - largest);
  std::fill(p + count, p + end, 0.f);
  for (int64_t j = 0; j < end; j += kWidth<V>) {
    read(v, p + j);
    sums += v;
  }
  for (int64_t lane = 0; lane < kWidth<V>; ++lane) total += sums[lane];
  return total;
}

// R query rows from `first` on, of one head. `room` holds R rows of scores, R of queries and R of results.
template <class V, int R, int C>
INLINE_BODY void attend_rows(const Prompt& a, int64_t b, int64_t head, int64_t first, float* room) {
  const int64_t count = std::min<int64_t>(R, a.rows - first), width = padded(a.length), d_padded = padded(a.d);
  const int64_t before = a.length - a.rows + first, seen = before + count, kv = b * a.kv_heads + a.kv_head[head];
  const float *keys = a.keys + kv * width * a.d, *values = a.values + kv * a.length * d_padded;
  const int64_t row = score_row(a.length);
  float *scores = room, *q = scores + R * row, *result = q + R * d_padded;
  for (int64_t r = 0; r < R; ++r)  // rows after the last repeat it, and are not written
    std::copy_n(a.q + ((b * a.rows + first + std::min(r, count - 1)) * a.heads + head) * a.d, a.d, q + r * d_padded);
  constexpr int64_t columns = C * kWidth<V>;
  const int64_t next_keys = kWidth<V> == kLanes ? a.d * kLanes : kWidth<V>;  // in the next sixteen, or in the same
  for (int64_t j = 0; j < seen; j += columns)
    multiply<V, R, C>(q, d_padded, keys + j * a.d, kLanes, next_keys, a.d, scores + j, row);
  float total[R];
  for (int64_t r = 0; r < count; ++r) {
    float* p = scores + r * row;
    total[r] = exponentials<V>(p, before + r + 1);
    std::fill(p + before + r + 1, p + seen, 0.f);
  }
  for (int64_t n = 0; n < d_padded; n += columns)
    multiply<V, R, C>(scores, row, values + n, d_padded, kWidth<V>, seen, result + n, d_padded);
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
    std::vector<float> room(rows.count * (score_row(length) + 2 * padded(d)));
    for (int64_t task = begin; task < end; ++task)
      rows.fn(a, task / blocks / heads, task / blocks % heads, task % blocks * rows.count, room.data());
  });
  return out;
}
