"""Layers for mixed precision: half-precision weights, float32 where sums are taken, casts where the two meet.

On CUDA and MPS `HalfLinear` multiplies in half and hands half on; few tokens under lean_decode on CUDA are multiplied in
float32 with the half weights (kernels/triton_products.py). On a CPU its weights are packed for the kernels, and the activations
between layers stay float32: half the bytes per decoded token, and products in bfloat16 for prefill where the CPU has an
instruction for them (AMX, AVX512-BF16).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from kernels.int8 import bf16_linear, kernels_run
from kernels.packing import pack_panels, panel_rows
from streaming import by_rows, rows_of


class HalfLinear(nn.Module):
    """A linear layer with its weight [N, K] in `dtype`, packed where the CPU kernels run. Returns `dtype` if `native`,
    else float32."""

    def __init__(self, source: nn.Linear, *, dtype: torch.dtype, native: bool):
        super().__init__()
        self.in_features, self.out_features, self.native = source.in_features, source.out_features, native

        def convert(rows: slice) -> tuple[torch.Tensor]:
            half = rows_of(source.weight, rows).to(dtype)
            return (pack_panels(half) if not native and dtype == torch.bfloat16 and kernels_run(half) else half,)

        (weight,) = by_rows(source.weight.shape, convert)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = (
            None if source.bias is None else nn.Parameter(source.bias.data.to(dtype if native else torch.float32), False)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.native:
            return F.linear(x.to(self.weight.dtype), self.weight, self.bias)
        return bf16_linear(x, self.weight, self.out_features, self.bias)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of W for `ids` [...]: float32 [..., K]."""
        packed = self.weight.dim() == 4
        return (panel_rows(self.weight, ids, self.in_features) if packed else self.weight[ids]).float()

    @property
    def logical_parameters(self) -> int:
        return self.in_features * self.out_features + (0 if self.bias is None else self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.weight.dtype}, native={self.native}"


class CastAfter(nn.Module):
    """Run `inner` (an RMSNorm, the rotary table) in its own precision and hand its result on in `dtype`.

    LlamaRMSNorm returns weight * x, so a float32 weight gives a float32 output, which a half-precision product rejects.
    """

    def __init__(self, inner: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.inner, self.dtype = inner, dtype

    def forward(self, *args, **kwargs):
        result = self.inner(*args, **kwargs)
        return tuple(part.to(self.dtype) for part in result) if isinstance(result, tuple) else result.to(self.dtype)
