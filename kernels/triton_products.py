"""Products of few rows on a CUDA device: each weight is read once, in whatever it is stored, and multiplied in float32.

A program (Triton's word for a block of threads) owns one row of x and a few output channels and walks along the inputs. Rows
come fastest in the order of programs, so that all rows of a step find a weight in the second-level cache once the first has
read it from memory; and a row gets the same bits whatever rows come with it, as drafts that must lose nothing require.
Many rows are arithmetic: there the weights are expanded and torch multiplies (kernels/int8.py). The twins are those of
the C++ kernels: int8_linear_reference, int8_weight_only_reference, bf16_linear_reference, int4_linear_reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TILE = 512  # inputs that a program multiplies at a time, of each of its channels
CHANNELS = 8
LARGEST_GROUP = 256  # inputs rounded with one scale: more would not stay in registers


def float_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x floating point [M, K], weight float32, float16 or bfloat16 [N, K] -> float32 [M, N]."""
    return _launch(x, weight, None, weight.shape[1], rounds=False)


def int8_product(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, group_size: int, *, int8_activations: bool
) -> torch.Tensor:
    """x floating point [M, K], weight int8 [N, K], scale [N, G] -> float32 [M, N]; `int8_activations` rounds x as well."""
    return _launch(x, weight, scale, group_size, rounds=int8_activations)


def int4_product(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, group_size: int
) -> torch.Tensor:
    """x floating point [M, K], weight uint8 [N, ceil(K / 2)], even inputs in the low halves -> float32 [M, N]; rounds x."""
    x = x.float().contiguous()
    rows, k = x.shape
    out = x.new_empty(rows, weight.shape[0])
    grid = rows, triton.cdiv(weight.shape[0], CHANNELS)
    _int4_product[grid](
        x, weight, scale, minimum, out, weight.shape[0], k, weight.shape[1], scale.shape[1],
        PAIRS=group_size // 2, GROUPS=max(1, TILE // group_size), CHANNELS=CHANNELS,
    )  # fmt: skip
    return out


def serves_group(group_size: int) -> bool:
    """Whether x can be rounded in groups of this size: powers of two that stay in registers."""
    return 2 <= group_size <= LARGEST_GROUP and group_size & (group_size - 1) == 0


def _launch(x, weight, scale, group_size: int, *, rounds: bool) -> torch.Tensor:
    x = x.float().contiguous()
    rows, (n, k) = x.shape[0], weight.shape
    out = x.new_empty(rows, n)
    shared = scale is not None and scale.shape[1] == 1  # one scale a channel: groups are only tiles then
    group = group_size if rounds or not (shared or scale is None) else LARGEST_GROUP
    _product[rows, triton.cdiv(n, CHANNELS)](
        x, weight, weight if scale is None else scale, out, n, k, 1 if scale is None else scale.shape[1],
        ROUNDS=rounds, SCALED=scale is not None, SHARED=shared, GROUP=group, GROUPS=max(1, TILE // group), CHANNELS=CHANNELS,
    )  # fmt: skip
    return out


@triton.jit
def nearest(x):
    """Rounds half to even: beyond 1.5 * 2^23 a float32 has no fraction left."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _product(
    x, weight, scale, out, n, k, scales, ROUNDS: tl.constexpr, SCALED: tl.constexpr, SHARED: tl.constexpr,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    # Axes are channel, group, input in the group. One scale a channel, or none: products are added up in place, and over
    # the axes once at the end. A scale for each group: its sum is taken first.
    row = tl.program_id(0)
    outputs = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    channels = outputs[:, None, None]
    of_tile = tl.arange(0, GROUPS)[None, :, None] * GROUP + tl.arange(0, GROUP)[None, None, :]
    total = tl.zeros([CHANNELS, GROUPS, GROUP], tl.float32)
    of_groups = tl.zeros([CHANNELS, GROUPS], tl.float32)
    for first in range(0, k, GROUPS * GROUP):
        inputs = first + of_tile
        values = tl.load(x + row * k + inputs, mask=inputs < k, other=0.0)
        places = channels.to(tl.int64) * k + inputs
        weights = tl.load(weight + places, mask=(channels < n) & (inputs < k), other=0).to(tl.float32)
        if ROUNDS:
            step = tl.max(tl.abs(values), 2, keep_dims=True) / 127
            values = nearest(tl.div_rn(values, tl.where(step == 0, 1.0, step).broadcast_to(1, GROUPS, GROUP)))
        if SCALED and not SHARED:
            groups = first // GROUP + tl.arange(0, GROUPS)[None, :]
            held = (outputs[:, None] < n) & (groups < scales)
            sums = tl.sum(values * weights, 2) * tl.load(scale + outputs[:, None] * scales + groups, mask=held, other=0.0)
            of_groups += sums * tl.sum(step, 2) if ROUNDS else sums
        else:
            total += values * step * weights if ROUNDS else values * weights
    result = tl.sum(of_groups, 1) if SCALED and not SHARED else tl.sum(tl.sum(total, 2), 1)
    if SHARED:
        result *= tl.load(scale + outputs, mask=outputs < n, other=0.0).to(tl.float32)
    tl.store(out + row * n + outputs, result, mask=outputs < n)


@triton.jit
def _int4_product(
    x, weight, scale, minimum, out, n, k, row_bytes, scales,
    PAIRS: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    # Axes are channel, group, pair of inputs in the group: a byte holds the codes of both.
    row = tl.program_id(0)
    outputs = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    channels = outputs[:, None, None]
    of_tile = tl.arange(0, GROUPS)[None, :, None] * PAIRS + tl.arange(0, PAIRS)[None, None, :]
    of_groups = tl.zeros([CHANNELS, GROUPS], tl.float32)
    for first in range(0, row_bytes, GROUPS * PAIRS):
        pairs = first + of_tile
        even = tl.load(x + row * k + 2 * pairs, mask=2 * pairs < k, other=0.0)
        odd = tl.load(x + row * k + 2 * pairs + 1, mask=2 * pairs + 1 < k, other=0.0)
        places = channels.to(tl.int64) * row_bytes + pairs
        codes = tl.load(weight + places, mask=(channels < n) & (pairs < row_bytes), other=0)
        step = tl.max(tl.maximum(tl.abs(even), tl.abs(odd)), 2, keep_dims=True) / 127
        divisor = tl.where(step == 0, 1.0, step).broadcast_to(1, GROUPS, PAIRS)
        even, odd = nearest(tl.div_rn(even, divisor)), nearest(tl.div_rn(odd, divisor))
        low, high = (codes & 15).to(tl.float32), (codes >> 4).to(tl.float32)
        groups = first // PAIRS + tl.arange(0, GROUPS)[None, :]
        held = (outputs[:, None] < n) & (groups < scales)
        steps = tl.load(scale + outputs[:, None] * scales + groups, mask=held, other=0.0).to(tl.float32)
        lowest = tl.load(minimum + outputs[:, None] * scales + groups, mask=held, other=0.0).to(tl.float32)
        sums = tl.sum(even * low + odd * high, 2) * steps + tl.sum(even + odd, 2) * lowest
        of_groups += sums * tl.sum(step, 2)
    tl.store(out + row * n + outputs, tl.sum(of_groups, 1), mask=outputs < n)
