// The products of linear.cpp, for other kernels: x float [M, K] -> float32 [M, N].
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

at::Tensor int8_linear(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& scale, int64_t n, int64_t group,
                       const std::optional<at::Tensor>& bias);
at::Tensor int8_weight_only_linear(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& scale, int64_t n,
                                   int64_t group, const std::optional<at::Tensor>& bias);
at::Tensor int4_linear(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& scale, const at::Tensor& minimum,
                       int64_t n, int64_t group, const std::optional<at::Tensor>& bias);
at::Tensor bf16_linear(const at::Tensor& x, const at::Tensor& packed, int64_t n, const std::optional<at::Tensor>& bias);
