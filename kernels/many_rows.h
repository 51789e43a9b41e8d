// Products of many rows: pairs of panels, made ready once for all rows, times blocks of rows on the widest units there are.
#pragma once

#include <cstring>
#include <vector>

#include "few_rows.h"

namespace {

enum class Kind { kInt8, kInt4, kInt8WeightOnly, kBFloat16 };

#if defined(__x86_64__)

// The loops for `m` rows of this product; null where a few rows at a time are as good as it gets.
const ManyRows* loops_for(Kind kind, int64_t m, const Weight& w) {
  const bool integers = kind == Kind::kInt8 || kind == Kind::kInt4, whole_tiles = w.group % 64 == 0 || w.group == w.k;
  const ManyRows* many = integers && active->many.tiles && !whole_tiles ? &kInt8Vectors : &active->many;
  return m > kFewRows && (integers ? many->int8 : many->bf16) ? many : nullptr;
}

// Rows as the blocks want them: int8 with scales and sums, or bfloat16. On matrix units in tiles, 32 rows of them for
// every 32 rows or part of them; else the extra 64 bytes keep rows of 2^n inputs off the same cache sets.
Rows rows_for_blocks(Kind kind, const Tensor& x, int64_t group, bool tiles) {
  const bool integers = kind == Kind::kInt8 || kind == Kind::kInt4;
  const int64_t m = x.size(0), k = x.size(1), groups = ceil_div(k, group), inputs = integers ? 64 : 32;
  const int64_t steps = ceil_div(k, inputs), padded = tiles ? ceil_div(m, kMaxBlockRows) * kMaxBlockRows : m;
  Rows rows{at::empty({padded, (steps + !tiles) * inputs}, integers ? at::kChar : at::kBFloat16), {}, {}, m};
  float *scales = nullptr, *sums = nullptr;
  if (integers) {
    rows.scale = at::zeros({padded, groups}, at::kFloat);
    rows.sum = at::zeros({padded, groups}, at::kFloat);
    scales = rows.scale.mutable_data_ptr<float>();
    sums = rows.sum.mutable_data_ptr<float>();
  }
  const float* from = x.const_data_ptr<float>();
  char* to = static_cast<char*>(rows.x.mutable_data_ptr());
  at::parallel_for(0, padded, ceil_div(32768, k), [&](int64_t begin, int64_t end) {
    std::vector<char> uncut(steps * 64);
    for (int64_t r = begin; r < end; ++r) {
      char* row = tiles ? uncut.data() : to + r * rows.row_bytes();
      std::memset(row, 0, steps * 64);  // what follows the last input, and groups of zeros, which are not written
      if (r < m && integers) active->for_int8.quantize(from + r * k, k, group, row, scales + r * groups, sums + r * groups);
      else if (r < m) round_row(from + r * k, k, reinterpret_cast<uint16_t*>(row));
      if (tiles) cut_row(row, r, steps, to);
    }
  });
  return rows;
}

// -128 * (sum of the inputs) for each row and group: takes back what unsigned weights add.
Tensor starts(Kind kind, const Rows& rows) {
  return kind == Kind::kInt8 ? rows.sum.mul(-128).to(at::kInt) : at::zeros(rows.sum.sizes(), at::kInt);
}

// Makes one panel ready; returns where it is, in `scratch` or where it was.
const char* ready_panel(Kind kind, const char* panel, const uint16_t* scale, const Weight& w, bool tiles, char* scratch) {
  const int64_t lines = w.panel_bytes / 64;
  if (kind == Kind::kBFloat16 || (kind == Kind::kInt8 && tiles)) return panel;
  if (kind == Kind::kInt8) expand_unsigned(panel, lines, scratch);
  else if (kind == Kind::kInt4) expand_int4(panel, lines, scratch);
  else expand_bf16(panel, lines, scale, w.group, w.groups(), scratch);
  return scratch;
}

TARGET_AVX512 void write_block(const float* from, int64_t rows, int64_t channels, const float* bias, float* y, int64_t n) {
  write_rows(from, kPair * kChannels, rows, channels, bias, y, n);
}

Tensor multiply_many(const ManyRows& many, Kind kind, const Tensor& x, const Weight& w, const optional<Tensor>& bias) {
  const bool integers = kind == Kind::kInt8 || kind == Kind::kInt4;
  const Rows rows = rows_for_blocks(kind, x, integers ? w.group : w.k, many.tiles);
  const Tensor start = integers ? starts(kind, rows) : Tensor();
  Tensor out = at::empty({rows.m, w.n}, at::kFloat);
  float* y = out.mutable_data_ptr<float>();
  const float* bias_data = bias.has_value() ? bias->const_data_ptr<float>() : nullptr;
  const int64_t groups = w.groups(), blocks = ceil_div(rows.m, many.block_rows);
  const bool scale_in_weights = kind == Kind::kInt8WeightOnly && groups > 1;
  // Int8 tiles take their turns one by one; vectors fetch once for as many bytes as a tile has.
  const int64_t fetches = rows.row_bytes() / 64 * (integers && many.tiles ? 4 : 1);
  share_panels(ceil_div(w.panels(), kPair), w.panels() * w.panel_bytes * rows.m, [&](int64_t begin, int64_t end) {
    const Tensor scratch = at::empty({2 * kPair * w.panel_bytes + 64}, at::kByte);
    alignas(64) float result[kMaxBlockRows * kPair * kChannels];
    if (many.enter) many.enter();
    Block b{};
    b.row_bytes = rows.row_bytes();
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
        b.w[i] = ready_panel(kind, w.data + panel * w.panel_bytes, scale_in_weights ? scale : nullptr, w, many.tiles,
                             static_cast<char*>(scratch.mutable_data_ptr()) + 2 * i * w.panel_bytes);
      }
      const int64_t first = pair * kPair * kChannels;
      b.next_lines = pair + 1 < end ? ceil_div(kPair * w.panel_bytes / 64, blocks * fetches) : 0;
      for (int64_t row = 0; row < rows.m; row += many.block_rows) {
        b.rows = static_cast<int>(std::min<int64_t>(many.block_rows, rows.m - row));
        b.next = w.data + (pair + 1) * kPair * w.panel_bytes + row / many.block_rows * fetches * b.next_lines * 64;
        b.x = static_cast<const char*>(rows.x.const_data_ptr()) + row * rows.row_bytes();
        if (integers) {
          b.x_scale = rows.scale.const_data_ptr<float>() + row * groups;
          b.x_sum = rows.sum.const_data_ptr<float>() + row * groups;
          b.start = start.const_data_ptr<int32_t>() + row * groups;
        }
        (integers ? many.int8 : many.bf16)(b);
        write_block(result, b.rows, std::min<int64_t>(kPair * kChannels, w.n - first),
                    bias_data ? bias_data + first : nullptr, y + row * w.n + first, w.n);
      }
    }
    if (many.leave) many.leave();
  });
  return out;
}

#else
const ManyRows* loops_for(Kind, int64_t, const Weight&) { return nullptr; }
Tensor multiply_many(const ManyRows&, Kind, const Tensor&, const Weight&, const optional<Tensor>&) { return {}; }
#endif

}  // namespace
