// What attention.cpp offers to the operators in layer.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

at::Tensor attend(const at::Tensor& q, const at::Tensor& keys, const at::Tensor& values,
                  const std::optional<at::Tensor>& key_scale, const std::optional<at::Tensor>& value_scale, int64_t length,
                  double scaling, const std::optional<at::Tensor>& kv_of_head);
at::Tensor rope_append(const at::Tensor& qkv, const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& keys,
                       const at::Tensor& values, const std::optional<at::Tensor>& key_scale,
                       const std::optional<at::Tensor>& value_scale, int64_t past);
