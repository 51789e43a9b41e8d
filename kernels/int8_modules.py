"""Modules with int8 weights: a linear layer, an embedding table, and torch's own deprecated linear as a contrast."""

from __future__ import annotations

import torch
from torch import nn

from kernels.build import cpu_note, gpu_kernels, load_kernels
from kernels.device_int8 import serves
from kernels.int8 import dequantize_groups, int8_linear, int8_weight_only_linear, pack, quantize_groups
from kernels.packing import panel_rows, scale_rows
from streaming import by_rows, read_weights, rows_of


class Int8Linear(nn.Module):
    """y = x W^T + b with W in int8, one bfloat16 scale per output channel and group of inputs.

    `weight` is int8 [N, K] and `scale` [N, G]; both are packed (kernels/packing.py) where the CPU
    kernels run. With `int8_activations` x is quantised per token and group on the fly.
    """

    def __init__(self, source: nn.Linear, *, group_size: int | None, int8_activations: bool, per_tensor: bool = False):
        super().__init__()
        self.in_features, self.out_features = source.in_features, source.out_features
        self.group_size = min(group_size or source.in_features, source.in_features)
        self.int8_activations = int8_activations
        one_scale = _scale_of_all(source.weight) if per_tensor else None

        def convert(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
            values = rows_of(source.weight, rows)
            if one_scale is None:
                return pack(*quantize_groups(values, self.group_size, torch.bfloat16))
            quantized = (values.float() / one_scale.float()).round().clamp(-127, 127).to(torch.int8)
            return pack(quantized, one_scale.expand(len(values), 1).contiguous())

        weight, scale = by_rows(source.weight.shape, convert)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = None if source.bias is None else nn.Parameter(source.bias.data.float(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        multiply = int8_linear if self.int8_activations else int8_weight_only_linear
        return multiply(x, self.weight, self.scale, self.out_features, self.group_size, self.bias).to(x.dtype)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Dequantised rows of W for `ids` [...]: float32 [..., K]."""
        if self.weight.dim() == 4:
            quantized, scale = panel_rows(self.weight, ids, self.in_features), scale_rows(self.scale, ids)
        else:
            quantized, scale = self.weight[ids], self.scale[ids]
        return dequantize_groups(quantized, scale, self.group_size)

    @property
    def logical_parameters(self) -> int:
        return self.in_features * self.out_features + (0 if self.bias is None else self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, group={self.group_size}, int8_activations={self.int8_activations}"


class Int8Table(nn.Module):
    """An embedding table in int8 rows."""

    def __init__(self, source: nn.Embedding, *, group_size: int | None):
        super().__init__()
        self.group_size = group_size or source.embedding_dim
        self.logical_parameters = source.weight.numel()
        weight, scale = by_rows(
            source.weight.shape,
            lambda rows: quantize_groups(rows_of(source.weight, rows), self.group_size, torch.bfloat16),
        )
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return dequantize_groups(self.weight[ids], self.scale[ids], self.group_size)


class ClassicLinear(nn.Module):
    """torch.ao's dynamically quantised linear: qint8 weights per tensor, activations per tensor in 7 bits on x86."""

    def __init__(self, source: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = source.in_features, source.out_features
        read_weights(source)
        source.qconfig = torch.ao.quantization.default_dynamic_qconfig
        self._inner = [torch.ao.nn.quantized.dynamic.Linear.from_float(source)]  # a list hides it from state_dict

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._inner[0](x)

    @property
    def logical_parameters(self) -> int:
        return self.in_features * self.out_features + (0 if self._inner[0].bias() is None else self.out_features)

    def packed_tensors(self) -> dict[str, torch.Tensor]:
        """The int8 values and the scale that torch keeps out of sight in its packed weight."""
        weight = self._inner[0].weight()
        tensors = {"weight": weight.int_repr(), "scale": torch.tensor([weight.q_scale()])}
        return tensors if self._inner[0].bias() is None else tensors | {"bias": self._inner[0].bias()}


def _scale_of_all(weight: torch.Tensor) -> torch.Tensor:
    """absmax / 127 of a whole matrix: bfloat16, one number."""
    (largest,) = by_rows(weight.shape, lambda rows: (rows_of(weight, rows).abs().amax(1),))
    return (largest.max().float() / 127).bfloat16()


def kernel_note(device: torch.device, scheme: str) -> str:
    """Which arithmetic runs on `device`: for the record's notes."""
    if device.type == "cuda" and scheme != "dynamic" and gpu_kernels() is None:
        return "Triton kernels for few tokens, float32 products of expanded weights for many"
    if device.type != "cpu":
        sample = torch.zeros(8, 8, dtype=torch.int8, device=device), torch.ones(8, 2 if scheme == "grouped" else 1)
        own = serves(scheme, *sample)
        return f"torch's own operator on {device.type}" if own else f"float32 products of expanded weights on {device.type}"
    return load_kernels() or cpu_note()
