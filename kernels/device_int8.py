"""torch's own int8 products on CUDA and MPS. Each is tried once against the twin before it is trusted.

CUDA has an integer matrix product (`_int_mm`), which serves one scale per token and channel; CUDA and MPS have a product
of floating-point activations with int8 weights (`_weight_int8pack_mm`), one scale per channel. Neither knows groups.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F

LEAST_ROWS = 17  # _int_mm on CUDA refuses 16 rows or fewer: a decode step is padded
MULTIPLE = 8  # ... and inner and outer sizes that are no multiple of 8


def dynamic_product(q: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """q int8 [M, K], x_scale [M, 1], weight int8 [N, K], scale [N, 1] -> float32 [M, N], exact in its integers."""
    rows = q.shape[0]
    padded = F.pad(q, (0, 0, 0, max(0, LEAST_ROWS - rows)))
    return torch._int_mm(padded, weight.t())[:rows].float() * x_scale * scale.t()


def weight_only_product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x [M, K] in half precision, weight int8 [N, K], scale [N, 1] -> float32 [M, N]."""
    half = torch.bfloat16 if x.device.type == "cuda" else torch.float16
    return torch._weight_int8pack_mm(x.to(half), weight, scale[:, 0].to(half)).float()


def serves(kind: str, weight: torch.Tensor, scale: torch.Tensor) -> bool:
    """Whether the product of this `kind` (dynamic or weight-only) runs, and is right, for this weight on its device."""
    even = weight.shape[0] % MULTIPLE == 0 and weight.shape[1] % MULTIPLE == 0
    return weight.dim() == 2 and scale.shape[1] == 1 and even and _is_right(kind, weight.device.type)


@cache
def _is_right(kind: str, device: str) -> bool:
    """Largest values, where a saturating instruction fails, on one and on thirty-three rows."""
    signs = torch.arange(64).remainder(2).mul(2).sub(1)
    weight = (127 * signs)[:, None].expand(64, 64).to(torch.int8).contiguous()
    scale = torch.ones(64, 1)
    try:
        for rows in (1, 33):
            q = torch.full((rows, 64), 127, dtype=torch.int8)
            expected = (127 * 127 * 64 * signs).float().expand(rows, 64)
            on_device = [tensor.to(device) for tensor in (weight, scale)]
            if kind == "dynamic":
                got = dynamic_product(q.to(device), torch.ones(rows, 1, device=device), *on_device)
            else:  # x = 1: the sums stay within float16
                got = weight_only_product(torch.ones(rows, 64, device=device), *on_device)
                expected = expected / 127
            if not torch.allclose(got.cpu(), expected, rtol=1e-2):
                return False
    except (RuntimeError, NotImplementedError):  # the operator is missing on this device or build
        return False
    return True
