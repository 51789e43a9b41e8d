"""Layers for mixed precision: half-precision weights, float32 where sums are taken, casts where the two meet.

`HalfLinear` multiplies in half where the device can. A CPU without bf16 arithmetic keeps the activations in float32 and
expands the weights as it reads them: half the bytes per decoded token, the same arithmetic as float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from kernels.int8 import bf16_linear


class HalfLinear(nn.Module):
    """A linear layer with its weight in `dtype`. Returns `dtype` if `native`, else float32. Weight [N, K], bias [N]."""

    def __init__(self, source: nn.Linear, *, dtype: torch.dtype, native: bool, weight: nn.Parameter | None = None):
        super().__init__()
        self.in_features, self.out_features, self.native = source.in_features, source.out_features, native
        self.weight = weight if weight is not None else _half(source.weight, dtype)
        self.bias = (
            None if source.bias is None else nn.Parameter(source.bias.data.to(dtype if native else torch.float32), False)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.native:
            return F.linear(x.to(self.weight.dtype), self.weight, self.bias)
        return bf16_linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.weight.dtype}, native={self.native}"


class HalfTable(nn.Module):
    """An embedding table in half precision that looks up float32 rows: for tables that lm_head shares."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.weight).float()


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


def _half(weight: torch.Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(weight.data.to(dtype), requires_grad=False)
