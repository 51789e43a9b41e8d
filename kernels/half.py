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

from kernels.int8 import finish, kernel_is_fastest, kernels_run, multiply_in_blocks, shaped_like
from kernels.packing import pack_panels, panel_rows, unpack_panels
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


def bf16_linear(x: torch.Tensor, weight: torch.Tensor, n: int, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Multiplies float activations [..., K] with bfloat16 weights, plain [n, K] or packed: float32 [..., n]."""
    rows = x.reshape(-1, x.shape[-1])
    if weight.dim() != 4 or not kernels_run(x):
        plain = weight if weight.dim() == 2 else unpack_panels(weight, n, x.shape[-1])
        return bf16_linear_reference(x, plain, bias)
    if kernel_is_fastest(rows):
        return shaped_like(x, torch.ops.tinyopt.bf16_linear(rows, weight, n, bias))

    def expand(first: int, last: int) -> torch.Tensor:
        return unpack_panels(weight[first // 16 : -(-last // 16)], last - first, x.shape[-1]).float()

    return finish(multiply_in_blocks(rows, n, expand), x, bias)


def bf16_linear_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The twin of bf16_linear: x floating point [..., K], weight bfloat16 [N, K] -> float32 [..., N].

    More than 16 rows are rounded to bfloat16 on a CPU that has an instruction for it; the twin does not round.
    """
    return F.linear(x.float(), weight.float(), bias)
