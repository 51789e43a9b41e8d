// What attention.cpp and prompt_attention.cpp offer to each other and to the operators in layer.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

// Raise a sentence with the operator's name: for a cache [B, Hkv, capacity, d] with fewer than `length` tokens or of another
// kind, for queries [B, T, Hq, d] that do not fit it, for a map from query heads to KV heads that is none.
void check_cache(const char* op, const at::Tensor& cache, const std::optional<at::Tensor>& scale, int64_t length);
void check_attention(const char* op, const at::Tensor& q, const at::Tensor& keys, const at::Tensor& values,
                     const std::optional<at::Tensor>& key_scale, const std::optional<at::Tensor>& value_scale, int64_t length);
std::vector<int64_t> kv_heads_of(const char* op, const std::optional<at::Tensor>& kv_of_head, int64_t heads, int64_t kv_heads);

at::Tensor attend(const at::Tensor& q, const at::Tensor& keys, const at::Tensor& values,
                  const std::optional<at::Tensor>& key_scale, const std::optional<at::Tensor>& value_scale, int64_t length,
                  double scaling, const std::optional<at::Tensor>& kv_of_head);
at::Tensor attend_prompt(const at::Tensor& q, const at::Tensor& keys, const at::Tensor& values,
                         const std::optional<at::Tensor>& key_scale, const std::optional<at::Tensor>& value_scale,
                         int64_t length, double scaling, const std::optional<at::Tensor>& kv_of_head);
at::Tensor rope_append(const at::Tensor& qkv, const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& keys,
                       const at::Tensor& values, const std::optional<at::Tensor>& key_scale,
                       const std::optional<at::Tensor>& value_scale, int64_t past);
