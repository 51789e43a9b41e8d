// Attention over a KV cache that is read as it lies, and what enters it.
//
// Keys and values lie in [B, Hkv, capacity, d] and never move: float32, bfloat16, or int8 with a float32 scale per token
// and KV head [B, Hkv, capacity]. All query heads of a KV head share each row that is read.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

#include "attention.h"
#include "rows.h"

namespace {

using at::Tensor;
using std::optional;

constexpr int64_t kBlock = 64;     // keys and values widened to float32 at a time: they stay in the first-level cache
constexpr int64_t kSegment = 256;  // keys of one task; fixed, so that a sum's order does not depend on rows or threads
constexpr int64_t kMaxHeadDim = 256;

struct Attention {
  const float* q;                        // [B, T, Hq, d]
  const void *keys, *values;             // [B, Hkv, capacity, d]
  const float *key_scale, *value_scale;  // [B, Hkv, capacity] or null
  int64_t batch, rows, heads, kv_heads, d, capacity, length;  // the last row sees `length` keys
  float scaling;
  std::vector<std::vector<int64_t>> readers;  // query heads of each KV head
  float* partial;  // [B, segments, T, Hq, d + 2]: sum of p * v, sum of p, largest score
  int64_t segments() const { return (length + kSegment - 1) / kSegment; }
  float* state(int64_t b, int64_t segment, int64_t t, int64_t head) const {
    return partial + (((b * segments() + segment) * rows + t) * heads + head) * (d + 2);
  }
};

// A block of keys side by side [d, kBlock] and of values as rows [kBlock, padded d], both zero where there is nothing, with what
// a score and a probability are multiplied by.
struct Block {
  alignas(64) float keys[kMaxHeadDim * kBlock];
  alignas(64) float values[kBlock * kMaxHeadDim];
  float key_scale[kBlock], value_scale[kBlock];
};

template <class V, class KV>
INLINE_BODY void read_block(const Attention& a, int64_t row_of_cache, int64_t count, Block& block) {
  constexpr int64_t width = kWidth<V>;
  const int64_t d = a.d, stride = padded(d);
  const KV* keys = static_cast<const KV*>(a.keys) + row_of_cache * d;
  const KV* values = static_cast<const KV*>(a.values) + row_of_cache * d;
  float* rows = block.values;  // keys pass through where the values will be
  for (int64_t j = 0; j < count; ++j) {
    for (int64_t n = 0; n < d; ++n) rows[j * stride + n] = widened(keys[j * d + n]);
    std::fill(rows + j * stride + d, rows + (j + 1) * stride, 0.f);
  }
  const int64_t end = std::min(kBlock, padded(count));
  std::fill(rows + count * stride, rows + end * stride, 0.f);
  for (int64_t j = 0; j < end; j += width) {
    for (int64_t n = 0; n < d; n += width) {
      V square[width];
      for (int64_t i = 0; i < width; ++i) read(square[i], rows + (j + i) * stride + n);
      transpose<V>(square);
      for (int64_t i = 0; i < std::min(width, d - n); ++i) std::memcpy(block.keys + (n + i) * kBlock + j, &square[i], sizeof(V));
    }
  }
  for (int64_t j = 0; j < count; ++j)
    for (int64_t n = 0; n < d; ++n) rows[j * stride + n] = widened(values[j * d + n]);
  for (int64_t j = 0; j < count; ++j) {
    block.key_scale[j] = a.scaling * (a.key_scale ? a.key_scale[row_of_cache + j] : 1.f);
    block.value_scale[j] = a.value_scale ? a.value_scale[row_of_cache + j] : 1.f;
  }
}

// R of the rows and query heads that read one KV head, from the `first` of them on, see a block of `count` keys, the one at
// `start`: softmax is kept running.
template <class V, int R, int C>
INLINE_BODY void attend_block(const Attention& a, const Block& block, int64_t b, int64_t kv_head, int64_t segment, int64_t first,
                              int64_t start, int64_t count) {
  const std::vector<int64_t>& readers = a.readers[kv_head];
  const int64_t sharing = readers.size(), last = a.rows * sharing - 1, d = a.d, stride = padded(d);
  constexpr int64_t columns = C * kWidth<V>;
  alignas(64) float scores[R * kBlock], sums[R * kMaxHeadDim];
  const float *q[R], *p[R];
  float *state[R], shrink[R];
  int64_t seen[R];
  for (int64_t r = 0; r < R; ++r) {  // those after the last repeat it, and are not written
    const int64_t pair = std::min(first + r, last), t = pair / sharing, head = readers[pair % sharing];
    q[r] = a.q + ((b * a.rows + t) * a.heads + head) * d;
    p[r] = scores + r * kBlock;
    state[r] = a.state(b, segment, t, head);
    seen[r] = first + r > last ? 0 : std::clamp<int64_t>(a.length - a.rows + t + 1 - start, 0, count);
  }
  for (int64_t j = 0; j < count; j += columns)
    multiply<V, R, C>(q, block.keys + j, kBlock, kWidth<V>, d, scores + j, kBlock);
  for (int64_t r = 0; r < R; ++r) {
    float* of_row = scores + r * kBlock;
    if (seen[r] > 0) {
      for (int64_t j = 0; j < seen[r]; ++j) of_row[j] *= block.key_scale[j];
      const float before = state[r][d + 1], largest = std::max(before, largest_of<V>(of_row, seen[r]));
      shrink[r] = before == largest ? 1.f : fast_exp(before - largest);
      state[r][d] = state[r][d] * shrink[r] + exponentials<V>(of_row, seen[r], largest);
      state[r][d + 1] = largest;
      for (int64_t j = 0; j < seen[r]; ++j) of_row[j] *= block.value_scale[j];
    }
    std::fill(of_row + seen[r], of_row + count, 0.f);
  }
  for (int64_t n = 0; n < stride; n += columns)
    multiply<V, R, C>(p, block.values + n, stride, kWidth<V>, count, sums + n, stride);
  for (int64_t r = 0; r < R; ++r)
    for (int64_t n = 0; n < d && seen[r] > 0; ++n) state[r][n] = state[r][n] * shrink[r] + sums[r * stride + n];
}

// One KV head, one segment of keys, all query heads and rows that read them.
template <class V, int R, int C, class KV>
INLINE_BODY void attend_segment(const Attention& a, int64_t b, int64_t kv_head, int64_t segment) {
  const int64_t first = segment * kSegment, last = std::min(first + kSegment, a.length);
  for (int64_t t = 0; t < a.rows; ++t) {
    for (const int64_t head : a.readers[kv_head]) {
      float* state = a.state(b, segment, t, head);
      std::fill_n(state, a.d + 1, 0.f);
      state[a.d + 1] = -INFINITY;
    }
  }
  const int64_t pairs = a.rows * a.readers[kv_head].size();
  Block block;
  for (int64_t start = first; start < last; start += kBlock) {
    const int64_t count = std::min(kBlock, last - start);
    read_block<V, KV>(a, (b * a.kv_heads + kv_head) * a.capacity + start, count, block);
    int64_t pair = 0;
    for (; pairs - pair > R / 2; pair += R) attend_block<V, R, C>(a, block, b, kv_head, segment, pair, start, count);
    if (pair < pairs) attend_block<V, R / 2, C>(a, block, b, kv_head, segment, pair, start, count);
  }
}

using AttendFn = void (*)(const Attention&, int64_t, int64_t, int64_t);
template <class KV>
void attend_portable(const Attention& a, int64_t b, int64_t h, int64_t s) { attend_segment<Vec4, 2, 4, KV>(a, b, h, s); }
#if defined(__x86_64__)
template <class KV>
TARGET_AVX2 void attend_avx2(const Attention& a, int64_t b, int64_t h, int64_t s) { attend_segment<Vec8, 6, 2, KV>(a, b, h, s); }
template <class KV>
TARGET_AVX512 void attend_avx512(const Attention& a, int64_t b, int64_t h, int64_t s) { attend_segment<Vec, 8, 2, KV>(a, b, h, s); }
#endif

template <class KV>
AttendFn attend_fn() {
#if defined(__x86_64__)
  if (active_isa() == Isa::kAvx512) return attend_avx512<KV>;
  if (active_isa() == Isa::kAvx2) return attend_avx2<KV>;
#endif
  return attend_portable<KV>;
}

uint16_t bf16_bits(float v) { return c10::BFloat16(v).x; }

// Puts one row of d numbers where token `token` of a cache has its place.
void keep(const float* row, int64_t d, const Tensor& cache, float* scales, int64_t token) {
  if (cache.scalar_type() == at::kFloat) {
    std::copy_n(row, d, cache.mutable_data_ptr<float>() + token * d);
  } else if (cache.scalar_type() == at::kBFloat16) {
    auto* to = static_cast<uint16_t*>(cache.mutable_data_ptr()) + token * d;
    for (int64_t i = 0; i < d; ++i) to[i] = bf16_bits(row[i]);
  } else {
    float largest = 0.f;
    bool finite = true;
    for (int64_t i = 0; i < d; ++i) {
      largest = std::max(largest, std::abs(row[i]));
      finite &= std::isfinite(row[i]);
    }
    const float scale = finite ? largest / 127.f : NAN;  // NaN must show in what attention reads
    scales[token] = scale;
    int8_t* to = cache.mutable_data_ptr<int8_t>() + token * d;
    for (int64_t i = 0; i < d; ++i)
      to[i] = scale > 0.f ? static_cast<int8_t>(std::clamp(std::nearbyint(row[i] / scale), -127.f, 127.f)) : 0;
  }
}

}  // namespace

void check_cache(const char* op, const Tensor& cache, const optional<Tensor>& scale, int64_t length) {
  const bool int8 = cache.scalar_type() == at::kChar;
  TORCH_CHECK(cache.dim() == 4 && cache.is_cpu() && cache.is_contiguous() && length <= cache.size(2) &&
                  cache.size(1) > 0 && cache.size(3) > 0 &&
                  (int8 || cache.scalar_type() == at::kFloat || cache.scalar_type() == at::kBFloat16),
              op, ": keys and values must be contiguous float32, bfloat16 or int8 [B, Hkv, capacity, d], got ",
              cache.scalar_type(), " ", cache.sizes(), " for ", length, " tokens");
  TORCH_CHECK(int8 == scale.has_value(), op, ": int8 keys and values need scales, others have none");
  TORCH_CHECK(!scale || (scale->scalar_type() == at::kFloat && scale->is_contiguous() &&
                         scale->sizes() == cache.sizes().slice(0, 3)),
              op, ": scales must be contiguous float32 [B, Hkv, capacity]");
}

void check_attention(const char* op, const Tensor& q, const Tensor& keys, const Tensor& values,
                     const optional<Tensor>& key_scale, const optional<Tensor>& value_scale, int64_t length) {
  check_cache(op, keys, key_scale, length);
  check_cache(op, values, value_scale, length);
  TORCH_CHECK(length > 0 && q.dim() == 4 && q.scalar_type() == at::kFloat && q.is_cpu() && q.is_contiguous() &&
                  q.size(0) == keys.size(0) &&
                  q.size(3) == keys.size(3) && q.size(1) <= length && keys.sizes() == values.sizes() &&
                  keys.scalar_type() == values.scalar_type(),
              op, ": q must be contiguous float32 [B, T, Hq, d] for keys ", keys.sizes(), ", got ", q.sizes());
}

std::vector<int64_t> kv_heads_of(const char* op, const optional<Tensor>& kv_of_head, int64_t heads, int64_t kv_heads) {
  TORCH_CHECK(kv_of_head ? kv_of_head->numel() == heads : heads % kv_heads == 0, op, ": ", heads, " query heads on ",
              kv_heads, " KV heads need a map");
  const Tensor whole = kv_of_head ? kv_of_head->contiguous() : Tensor();
  const int64_t* map = kv_of_head ? whole.const_data_ptr<int64_t>() : nullptr;
  std::vector<int64_t> kv(heads);
  for (int64_t head = 0; head < heads; ++head) {
    kv[head] = map ? map[head] : head / (heads / kv_heads);
    TORCH_CHECK(kv[head] >= 0 && kv[head] < kv_heads, op, ": no KV head ", kv[head]);
  }
  return kv;
}

// q float32 [B, T, Hq, d], the last T of `length` tokens -> float32 [B, T, Hq * d]. Row t sees length - T + t + 1 keys.
Tensor attend(const Tensor& q, const Tensor& keys, const Tensor& values, const optional<Tensor>& key_scale,
              const optional<Tensor>& value_scale, int64_t length, double scaling, const optional<Tensor>& kv_of_head) {
  check_attention("attend", q, keys, values, key_scale, value_scale, length);
  TORCH_CHECK(q.size(3) <= kMaxHeadDim, "attend: d must be at most ", kMaxHeadDim, ", got ", q.size(3));
  Attention a{q.const_data_ptr<float>(), keys.const_data_ptr(), values.const_data_ptr(),
              key_scale ? key_scale->const_data_ptr<float>() : nullptr,
              value_scale ? value_scale->const_data_ptr<float>() : nullptr,
              q.size(0), q.size(1), q.size(2), keys.size(1), q.size(3), keys.size(2), length,
              static_cast<float>(scaling), {}, nullptr};
  a.readers.resize(a.kv_heads);
  const std::vector<int64_t> kv = kv_heads_of("attend", kv_of_head, a.heads, a.kv_heads);
  for (int64_t head = 0; head < a.heads; ++head) a.readers[kv[head]].push_back(head);
  const Tensor partial = at::empty({a.batch * a.segments() * a.rows * a.heads * (a.d + 2)}, at::kFloat);
  a.partial = partial.mutable_data_ptr<float>();
  const AttendFn fn = keys.scalar_type() == at::kFloat ? attend_fn<float>()
                      : keys.scalar_type() == at::kChar ? attend_fn<int8_t>() : attend_fn<uint16_t>();
  const int64_t keys_a_thread = 4096 / std::max<int64_t>(1, a.rows * a.heads / a.kv_heads);
  at::parallel_for(0, a.batch * a.kv_heads * a.segments(), std::max<int64_t>(1, keys_a_thread / std::min(length, kSegment)),
                   [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task)
      fn(a, task / a.segments() / a.kv_heads, task / a.segments() % a.kv_heads, task % a.segments());
  });
  Tensor out = at::empty({a.batch, a.rows, a.heads * a.d}, at::kFloat);
  float* y = out.mutable_data_ptr<float>();
  const int64_t width = a.d + 2, heads = a.rows * a.heads;
  for (int64_t i = 0; i < a.batch * heads; ++i) {  // segments are joined in their order
    const float* first = a.partial + (i / heads * a.segments() * heads + i % heads) * width;
    float largest = -INFINITY, total = 0.f;
    for (int64_t s = 0; s < a.segments(); ++s) largest = std::max(largest, first[s * heads * width + a.d + 1]);
    std::fill_n(y + i * a.d, a.d, 0.f);
    for (int64_t s = 0; s < a.segments(); ++s) {
      const float* state = first + s * heads * width;
      const float share = std::exp(state[a.d + 1] - largest);
      total += share * state[a.d];
      for (int64_t n = 0; n < a.d; ++n) y[i * a.d + n] += share * state[n];
    }
    for (int64_t n = 0; n < a.d; ++n) y[i * a.d + n] /= total;
  }
  return out;
}

// qkv float32 [B, T, (Hq + 2 Hkv) * d] -> q [B, T, Hq, d] with its positions; keys and values go to places past.. of the
// cache. cos and sin float32 [positions, d / 2], halves rotated as in transformers' Llama.
Tensor rope_append(const Tensor& qkv, const Tensor& cos, const Tensor& sin, const Tensor& keys, const Tensor& values,
                   const optional<Tensor>& key_scale, const optional<Tensor>& value_scale, int64_t past) {
  const int64_t batch = qkv.size(0), rows = qkv.size(1), kv_heads = keys.size(1), capacity = keys.size(2), d = keys.size(3);
  check_cache("rope_append", keys, key_scale, past + rows);
  check_cache("rope_append", values, value_scale, past + rows);
  const int64_t heads = qkv.size(2) / d - 2 * kv_heads, half = d / 2;
  TORCH_CHECK(d % 2 == 0 && d <= kMaxHeadDim, "rope_append: d must be even and at most ", kMaxHeadDim, ", got ", d);
  TORCH_CHECK(qkv.dim() == 3 && qkv.scalar_type() == at::kFloat && qkv.is_contiguous() && qkv.size(2) % d == 0 && heads > 0 &&
                  keys.size(0) == batch && keys.sizes() == values.sizes(),
              "rope_append: qkv must be contiguous float32 [B, T, (Hq + 2 Hkv) * d], got ", qkv.sizes());
  TORCH_CHECK(cos.scalar_type() == at::kFloat && cos.is_contiguous() && cos.dim() == 2 && cos.size(1) == half &&
                  past + rows <= cos.size(0) && sin.sizes() == cos.sizes() && sin.is_contiguous(),
              "rope_append: no angles for ", past + rows, " tokens in ", cos.sizes());
  Tensor q = at::empty({batch, rows, heads, d}, at::kFloat);
  const float *c = cos.const_data_ptr<float>(), *s = sin.const_data_ptr<float>();
  float* k_scales = key_scale ? key_scale->mutable_data_ptr<float>() : nullptr;
  float* v_scales = value_scale ? value_scale->mutable_data_ptr<float>() : nullptr;
  at::parallel_for(0, batch * rows, 16, [&](int64_t begin, int64_t end) {
    float rotated[kMaxHeadDim];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / rows, position = past + i % rows;
      const float* from = qkv.const_data_ptr<float>() + i * qkv.size(2);
      for (int64_t h = 0; h < heads + kv_heads; ++h) {
        const float* x = from + h * d;
        float* y = h < heads ? q.mutable_data_ptr<float>() + (i * heads + h) * d : rotated;
        for (int64_t n = 0; n < half; ++n) {
          y[n] = x[n] * c[position * half + n] - x[n + half] * s[position * half + n];
          y[n + half] = x[n + half] * c[position * half + n] + x[n] * s[position * half + n];
        }
        if (h < heads) continue;
        const int64_t token = (b * kv_heads + h - heads) * capacity + position;
        keep(rotated, d, keys, k_scales, token);
        keep(x + kv_heads * d, d, values, v_scales, token);
      }
    }
  });
  return q;
}
