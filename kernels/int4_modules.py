"""Modules with int4 weights: a linear layer, and the embedding table that shares its weights where the two are tied."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from kernels.int4 import Form, dequantize_int4, int4_linear, pack, pack_nibbles, quantize_int4, unpack_nibbles
from kernels.packing import CHANNELS, scale_rows
from streaming import by_rows, rows_of


class Int4Linear(nn.Module):
    """y = x W^T + b with W in int4 and x quantised to int8 per token and group on the fly; returns the dtype of x.

    `weight` holds two codes to a byte: uint8 [N, ceil(K / 2)], the first in the low half, with bfloat16 `scale` and
    `minimum` [N, G]; all three are packed in panels (kernels/packing.py) where the CPU kernels run. `form(rows)` gives
    codes (uint8 [n, K]), scale and minimum of a slice of rows, so that no matrix is unpacked whole; without it the weights of
    `source` are rounded to nearest, as quantize_int4 does with `search`.
    """

    def __init__(self, source: nn.Linear, *, group_size: int, form: Callable[[slice], Form] | None = None, search: bool = True):
        super().__init__()
        group_size = min(group_size, source.in_features)  # one head that pruning left may be narrower than a group
        self.in_features, self.out_features, self.group_size = source.in_features, source.out_features, group_size
        if form is None:

            def form(rows: slice) -> Form:
                return quantize_int4(rows_of(source.weight, rows), group_size, search=search)

        weight, scale, minimum = by_rows(source.weight.shape, lambda rows: pack(*form(rows)))
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("minimum", minimum)
        self.bias = None if source.bias is None else nn.Parameter(source.bias.data.float(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return int4_linear(x, self.weight, self.scale, self.minimum, self.out_features, self.group_size, self.bias).to(x.dtype)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Dequantised rows of W for `ids` [...]: float32 [..., K]."""
        if self.weight.dim() == 2:
            codes, scale, minimum = unpack_nibbles(self.weight[ids], self.in_features), self.scale[ids], self.minimum[ids]
        else:
            lines = self.weight[ids // CHANNELS, :, ids % CHANNELS]
            codes = torch.cat((lines & 15, lines >> 4), dim=-1).flatten(-2)[..., : self.in_features]
            scale, minimum = scale_rows(self.scale, ids), scale_rows(self.minimum, ids)
        return dequantize_int4(codes, scale, minimum, self.group_size)

    @property
    def logical_parameters(self) -> int:
        return self.in_features * self.out_features + (0 if self.bias is None else self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, group={self.group_size}"


class Int4Table(nn.Module):
    """An embedding table in int4 rows."""

    def __init__(self, source: nn.Embedding, *, group_size: int):
        super().__init__()
        self.group_size, self.width = group_size, source.embedding_dim
        self.logical_parameters = source.weight.numel()

        def convert(rows: slice) -> tuple[torch.Tensor, ...]:
            codes, scale, minimum = quantize_int4(rows_of(source.weight, rows), group_size)
            return pack_nibbles(codes), scale, minimum

        weight, scale, minimum = by_rows(source.weight.shape, convert)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("minimum", minimum)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows for `ids` [...]: float32 [..., width]."""
        codes = unpack_nibbles(self.weight[ids], self.width)
        return dequantize_int4(codes, self.scale[ids], self.minimum[ids], self.group_size)
