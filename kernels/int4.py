"""Int4 arithmetic of linear layers: 16 levels between a group's minimum and maximum, and the twin that defines the product.

A weight is `code * scale + minimum`: code in 0..15, `scale` and `minimum` bfloat16, one pair for each group of consecutive
inputs. Asymmetric, because 16 levels are too few to waste half a level on symmetry. The codes are found after scale and
minimum have been rounded to bfloat16, so that nothing is lost between choosing and storing them. A weight then takes
4 + 32 / group_size bits: 4.5 in groups of 64. Activations are symmetric int8 per token and group, as in kernels/int8.py.
"""

import torch
import torch.nn.functional as F

from kernels.int8 import (
    dequantize_groups,
    finish,
    gpu_products,
    kernel_is_fastest,
    kernels_run,
    multiply_add,
    multiply_in_blocks,
    quantize_groups,
    shaped_like,
)
from kernels.packing import pack_nibble_panels, pack_scales, unpack_nibble_panels, unpack_scales

LEVELS = 15
Form = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # codes uint8 [N, K], scale and minimum bfloat16 [N, G]
# Shares of a group's range that the search tries: cutting off the extremes makes the steps between all others finer.
SHRUNKEN = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
BLOCK_WEIGHTS = 1 << 18  # rounded at a time: the temporaries of the search stay in the cache
GROUP_SIZES = (32, 64, 128)


def quantize_int4(
    weight: torch.Tensor, group_size: int, *, search: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rounds to the nearest of 16 levels in groups of consecutive inputs.

    Args:
        weight: floating point [N, K].
        group_size: inputs per scale. The last group is short where K is no multiple of it.
        search: try shrunken ranges as well and keep, for each group, the one with the smallest squared error; without it
            the levels run from the smallest to the largest weight.

    Returns:
        codes uint8 [N, K] in 0..15, scale and minimum bfloat16 [N, ceil(K / group_size)]. A group of equal weights has
        scale 0. A group that holds NaN or Inf has scale NaN: it spoils the result visibly.
    """
    n, k = weight.shape
    groups = -(-k // group_size)
    codes = torch.empty(n, k, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(n, groups, dtype=torch.bfloat16, device=weight.device)
    minimum = torch.empty_like(scale)
    step = max(1, BLOCK_WEIGHTS // k)
    for first in range(0, n, step):
        rows = slice(first, first + step)
        values, real = _grouped(weight[rows].float(), group_size)
        scale[rows], minimum[rows] = _best_range(values, real, SHRUNKEN if search else SHRUNKEN[:1])
        levels = round_to_levels(values, scale[rows], minimum[rows]).flatten(1)[:, :k]
        codes[rows] = levels.to(torch.uint8).clamp_(max=LEVELS)  # where a weight is NaN, its cast could be anything
    return codes, scale, minimum


def round_to_levels(values: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
    """The nearest code of each of values [..., E], float32 in 0..15; scale and minimum [...] are shared by the last axis."""
    steps = torch.where(scale > 0, scale, torch.inf).float().unsqueeze(-1)  # a group of equal weights has code 0
    return (values - minimum.float().unsqueeze(-1)).div_(steps).round_().clamp_(0, LEVELS)


def nearest_change(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """W' - W, float32 [N, K]: what rounding to nearest, without a search for better grids, does to a weight."""
    return dequantize_int4(*quantize_int4(weight, group_size, search=False), group_size) - weight


def dequantize_int4(codes: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, group_size: int) -> torch.Tensor:
    """Undoes quantize_int4: codes uint8 [..., K], scale and minimum bfloat16 [..., G] -> float32 [..., K]."""
    missing = -codes.shape[-1] % group_size
    grouped = F.pad(codes.float(), (0, missing)).unflatten(-1, (-1, group_size))
    weight = grouped * scale.float().unsqueeze(-1) + minimum.float().unsqueeze(-1)
    return weight.flatten(-2)[..., : codes.shape[-1]].contiguous()


def int4_linear_reference(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    minimum: torch.Tensor,
    group_size: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The twin: y[m,n] = sum over g of xs[m,g] * scale[n,g] * sum_k xq codes + xs[m,g] * sum_k xq * minimum[n,g].

    Both sums over k are integers below 2^24 and exact; the sum over groups is float32, rounded as `int8_linear_reference` says.

    Args:
        x: floating point [..., K], quantised here to int8 per row and group (`quantize_groups`): xq, xs.
        codes: uint8 [N, K] in 0..15.
        scale, minimum: bfloat16 [N, ceil(K / group_size)].
        group_size: inputs per scale, of x and of the weight.
        bias: float32 [N].

    Returns:
        float32 [..., N]; NaN for every row of x that holds NaN or Inf.
    """
    xq, xs = quantize_groups(x.reshape(-1, x.shape[-1]), group_size)
    scale, minimum = scale.float(), minimum.float()
    out = torch.zeros(xq.shape[0], codes.shape[0], device=x.device)
    for group, start in enumerate(range(0, x.shape[-1], group_size)):
        inputs = xq[:, start : start + group_size].float()
        products = inputs @ codes[:, start : start + group_size].float().T
        x_scale = xs[:, group, None]
        out = multiply_add(products, x_scale * scale[:, group], out)
        out = multiply_add(x_scale * inputs.sum(1, keepdim=True), minimum[:, group], out)
    out = out if bias is None else out + bias
    return out.view(*x.shape[:-1], out.shape[-1])


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Two codes to a byte, the first in the low half: uint8 [N, K] in 0..15 -> uint8 [N, ceil(K / 2)]."""
    codes = F.pad(codes, (0, codes.shape[-1] % 2))
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: torch.Tensor, k: int) -> torch.Tensor:
    """Undoes pack_nibbles: uint8 [..., ceil(k / 2)] -> uint8 [..., k]."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)[..., :k]


def pack(codes: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Codes [N, K] two to a byte: in panels for the C++ kernels (kernels/packing.py), in rows where there are none."""
    if not kernels_run(codes):
        return pack_nibbles(codes), scale, minimum
    return pack_nibble_panels(codes), pack_scales(scale), pack_scales(minimum)


def unpack(
    packed: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, n: int, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Undoes pack: codes uint8 [n, k], scale and minimum [n, G]."""
    if packed.dim() == 2:
        return unpack_nibbles(packed, k), scale, minimum
    return unpack_nibble_panels(packed, n, k), unpack_scales(scale, n), unpack_scales(minimum, n)


def int4_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    minimum: torch.Tensor,
    n: int,
    group_size: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiplies x [..., K], quantised to int8 on the fly, with what `pack` made of int4 weights: float32 [..., n]."""
    rows = x.reshape(-1, x.shape[-1])
    if packed.dim() == 4 and kernels_run(x) and kernel_is_fastest(rows):
        return shaped_like(x, torch.ops.tinyopt.int4_linear(rows, packed, scale, minimum, n, group_size, bias))
    if packed.dim() == 2 and (products := gpu_products(rows, group_size)) is not None:
        return finish(products.int4_product(rows, packed, scale, minimum, group_size), x, bias)
    if x.device.type == "cpu" or packed.dim() == 4:
        return int4_linear_reference(x, *unpack(packed, scale, minimum, n, x.shape[-1]), group_size, bias)

    def expand(first: int, last: int) -> torch.Tensor:
        codes = unpack_nibbles(packed[first:last], x.shape[-1])
        return dequantize_int4(codes, scale[first:last], minimum[first:last], group_size)

    # The same integers times the same scales, multiplied as float32: the twin takes several calls for every group.
    rounded = dequantize_groups(*quantize_groups(rows, group_size), group_size)
    return finish(multiply_in_blocks(rounded, n, expand), x, bias)


def _grouped(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[N, K] -> [N, G, group_size] and which of its elements are real, None where all are.

    A short last group is filled up with its last weight: that leaves its range as it is.
    """
    n, k = weight.shape
    missing = -k % group_size
    if not missing:
        return weight.unflatten(1, (-1, group_size)), None
    filled = torch.cat([weight, weight[:, -1:].expand(n, missing)], 1).unflatten(1, (-1, group_size))
    real = torch.arange(k + missing, device=weight.device).view(1, -1, group_size) < k
    return filled, real


def _best_range(values: torch.Tensor, real: torch.Tensor | None, shares) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and minimum, bfloat16 [N, G], of the shrunken range with the smallest squared error for values [N, G, E]."""
    low, high = values.aminmax(dim=-1)
    best_error, best = None, None
    for share in shares:
        cut = (1 - share) / 2 * (high - low)
        minimum = (low + cut).bfloat16()
        # Measured from the minimum as it was rounded, so that the top level still reaches the largest weight.
        scale = ((high - cut - minimum.float()) / LEVELS).clamp_min(0).bfloat16()
        scale = torch.where((high > low) | values.isnan().any(-1), scale, 0)
        if len(shares) == 1:
            return scale, minimum
        levels = round_to_levels(values, scale, minimum)
        difference = levels * scale.float().unsqueeze(-1) + minimum.float().unsqueeze(-1) - values
        error = (difference if real is None else difference * real).square().sum(-1)
        if best_error is None:
            best_error, best = error, (scale, minimum)
            continue
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, scale, best[0]), torch.where(better, minimum, best[1])
    return best
