"""What a decoder layer does between its products, on a CUDA device: the operators of kernels/step.py for few tokens.

They differ from those in one thing: nothing about the KV cache is an argument of a call. How many tokens it holds is read from
`past` (int32 [1]) and where it lies from a row of a table in the device's memory: the addresses of keys, values and their
scales, and the capacity (int64 [5]). So a recorded step can be replayed on another cache, at another length
(kernels/device_step.py). Twins: add_rms_norm, silu_mul, rope_append and attend of kernels/step.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.triton_products import int8_product, nearest

BLOCK = 64  # tokens of the cache at a time
SPLIT = 256  # ... and for one program: a long cache is read by several, whose results are then joined
STORED = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.int8: tl.int8}


def add_rms_norm(residual: torch.Tensor, update: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Adds `update` to `residual`, float32 [M, H], in place and returns its RMSNorm times `weight` [H]."""
    rows, width = residual.shape
    out = torch.empty_like(residual)
    _add_rms_norm[(rows,)](
        residual, residual if update is None else update, weight, out, width, eps,
        ADDS=update is not None, WIDTH=triton.next_power_of_2(width),
    )  # fmt: skip
    return out


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, float32 [M, 2 I] -> [M, I]: the two side by side."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    _silu_mul[rows, triton.cdiv(width, 1024)](gate_up, out, width, WIDTH=1024)
    return out


def rope_append(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, past: torch.Tensor, place: torch.Tensor,
    *, tokens: int, kv_heads: int, head_dim: int, stored: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """Turns q and k of qkv, float32 [B * T, (Hq + 2 Hkv) * d], to their positions and puts k and v into the cache at `place`.

    Returns q float32 [B * T, Hq, d]. `stored` is the dtype of keys and values; int8 ones get a scale each.
    """
    heads = qkv.shape[1] // head_dim
    q = qkv.new_empty(qkv.shape[0], heads - 2 * kv_heads, head_dim)
    _rope_append[qkv.shape[0], heads](
        qkv, cos, sin, past, place, q, tokens, heads, kv_heads, head_dim,
        KIND=STORED[stored], HALF=triton.next_power_of_2(head_dim // 2),
    )  # fmt: skip
    return q


def attend(
    q: torch.Tensor, past: torch.Tensor, place: torch.Tensor, *, tokens: int, kv_heads: int, scaling: float,
    stored: torch.dtype, splits: int, kv_of_head: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Attention of the newest T tokens, q float32 [B * T, Hq, d], over the cache at `place`: float32 [B * T, Hq * d].

    `splits` programs share the cache, SPLIT tokens each: at least as many as it takes.
    """
    rows, heads, head_dim = q.shape
    parts = q.new_empty(rows, heads, splits, head_dim + 2)  # of each program: sums, largest score, sum of weights
    out = q.new_empty(rows, heads * head_dim)
    _attend[rows, heads, splits](
        q, past, place, past if kv_of_head is None else kv_of_head, out if splits == 1 else parts, tokens, heads, kv_heads,
        head_dim, scaling, KIND=STORED[stored], MAPPED=kv_of_head is not None, WIDTH=triton.next_power_of_2(head_dim),
        SPLITS=splits, SPLIT=SPLIT, BLOCK=BLOCK,
    )  # fmt: skip
    if splits > 1:
        _join[rows, heads](parts, out, heads, head_dim, SPLITS=splits, WIDTH=triton.next_power_of_2(head_dim))
    return out


def self_check(device: str) -> str | None:
    """The largest int8 values against exact arithmetic, and a token that attends to itself alone: its value comes back."""
    signs = torch.arange(24, device=device).remainder(2).mul(2).sub(1)
    weight = (127 * signs)[:, None].expand(24, 64).to(torch.int8).contiguous()
    x = torch.full((1, 64), 127.0, device=device)
    product = int8_product(x, weight, torch.ones(24, 1, device=device).bfloat16(), 64, int8_activations=True)
    if not torch.equal(product, (127 * 127 * 64 * signs[None]).float()):
        return "Triton kernels are wrong on this device: a product of int8 weights differs from exact arithmetic"
    keys, values = (torch.zeros(1, 1, 4, 16, dtype=torch.bfloat16, device=device) for _ in range(2))
    place = torch.tensor([keys.data_ptr(), values.data_ptr(), 0, 0, 4], device=device)
    past = torch.zeros(1, dtype=torch.int32, device=device)
    cos, sin = torch.ones(4, 8, device=device), torch.zeros(4, 8, device=device)
    qkv = torch.arange(64.0, device=device)[None]
    q = rope_append(qkv, cos, sin, past, place, tokens=1, kv_heads=1, head_dim=16, stored=torch.bfloat16)
    out = attend(q, past, place, tokens=1, kv_heads=1, scaling=1.0, stored=torch.bfloat16, splits=1)
    right = torch.equal(out, qkv[:, 48:].repeat(1, 2)) and torch.equal(keys[0, 0, :1].float(), qkv[:, 32:48])
    return None if right else "Triton kernels are wrong on this device: attention to one token is not its value"


@triton.jit
def _add_rms_norm(residual, update, weight, out, width, eps, ADDS: tl.constexpr, WIDTH: tl.constexpr):
    places = tl.arange(0, WIDTH)
    real = places < width
    row = tl.program_id(0) * width + places
    values = tl.load(residual + row, mask=real, other=0.0)
    if ADDS:
        values += tl.load(update + row, mask=real, other=0.0)
        tl.store(residual + row, values, mask=real)
    norm = tl.rsqrt(tl.sum(values * values, 0) / width + eps)
    tl.store(out + row, tl.load(weight + places, mask=real, other=0.0) * (values * norm), mask=real)


@triton.jit
def _silu_mul(gate_up, out, width, WIDTH: tl.constexpr):
    row = tl.program_id(0)
    places = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    real = places < width
    gate = tl.load(gate_up + row * 2 * width + places, mask=real, other=0.0)
    up = tl.load(gate_up + row * 2 * width + width + places, mask=real, other=0.0)
    tl.store(out + row * width + places, gate / (1.0 + tl.exp(-gate)) * up, mask=real)


@triton.jit
def _rope_append(
    qkv, cos, sin, past, place, q, tokens, heads, kv_heads, head_dim, KIND: tl.constexpr, HALF: tl.constexpr
):  # fmt: skip
    at, head = tl.program_id(0), tl.program_id(1)
    position = tl.load(past) + at % tokens
    half = head_dim // 2
    places = tl.arange(0, HALF)
    real = places < half
    states = qkv + (at * heads + head) * head_dim + places
    first = tl.load(states, mask=real, other=0.0)
    second = tl.load(states + half, mask=real, other=0.0)
    query_heads = heads - 2 * kv_heads
    if head < query_heads + kv_heads:  # values have no position
        c = tl.load(cos + position * half + places, mask=real, other=0.0)
        s = tl.load(sin + position * half + places, mask=real, other=0.0)
        turned = first * c - second * s
        second = second * c + first * s
        first = turned
    if head < query_heads:
        out = q + (at * query_heads + head) * head_dim + places
        tl.store(out, first, mask=real)
        tl.store(out + half, second, mask=real)
    else:
        which = (head - query_heads) // kv_heads  # 0 a key, 1 a value
        row = ((at // tokens) * kv_heads + (head - query_heads) % kv_heads) * tl.load(place + 4) + position
        if tl.int8 == KIND:
            scale = tl.maximum(tl.max(tl.abs(first), 0), tl.max(tl.abs(second), 0)) / 127
            scale += 0.0 * (tl.sum(first, 0) + tl.sum(second, 0))  # a maximum overlooks NaN, a later token must not
            tl.store(tl.load(place + 2 + which).to(tl.pointer_type(tl.float32)) + row, scale)
            divisor = tl.full([HALF], 0.0, tl.float32) + tl.where(scale == 0, 1.0, scale)
            first, second = nearest(tl.div_rn(first, divisor)), nearest(tl.div_rn(second, divisor))
        target = tl.load(place + which).to(tl.pointer_type(KIND)) + row * head_dim + places
        tl.store(target, first.to(KIND), mask=real)
        tl.store(target + half, second.to(KIND), mask=real)


@triton.jit
def _attend(
    q, past, place, kv_of_head, out, tokens, heads, kv_heads, head_dim, scaling, KIND: tl.constexpr, MAPPED: tl.constexpr,
    WIDTH: tl.constexpr, SPLITS: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(past) + at % tokens + 1
    kv_head = tl.load(kv_of_head + head).to(tl.int32) if MAPPED else head // (heads // kv_heads)
    begin = ((at // tokens) * kv_heads + kv_head) * tl.load(place + 4)
    # What torch allocates begins at a multiple of 16 bytes: then rows are read 16 bytes at a time.
    keys = tl.multiple_of(tl.load(place).to(tl.pointer_type(KIND)), 16) + begin * head_dim
    values = tl.multiple_of(tl.load(place + 1).to(tl.pointer_type(KIND)), 16) + begin * head_dim
    key_scales = tl.load(place + 2).to(tl.pointer_type(tl.float32)) + begin
    value_scales = tl.load(place + 3).to(tl.pointer_type(tl.float32)) + begin
    dims = tl.arange(0, WIDTH)
    wide = dims < head_dim
    query = tl.load(q + (at * heads + head) * head_dim + dims, mask=wide, other=0.0) * scaling
    best = tl.full([], float("-inf"), tl.float32)
    norm = tl.full([], 0.0, tl.float32)
    total = tl.zeros([WIDTH], tl.float32)
    for first in range(split * SPLIT, tl.minimum(length, (split + 1) * SPLIT), BLOCK):
        rows = first + tl.arange(0, BLOCK)
        real = rows < length
        places = rows[:, None] * head_dim + dims[None, :]
        mask = real[:, None] & wide[None, :]
        scores = tl.sum(query[None, :] * tl.load(keys + places, mask=mask, other=0).to(tl.float32), 1)
        if tl.int8 == KIND:
            scores *= tl.load(key_scales + rows, mask=real, other=0.0)
        scores = tl.where(real, scores, float("-inf"))
        largest = tl.maximum(best, tl.max(scores, 0))
        weights = tl.exp(scores - largest)
        shrink = tl.exp(best - largest)
        norm = norm * shrink + tl.sum(weights, 0)
        if tl.int8 == KIND:
            weights *= tl.load(value_scales + rows, mask=real, other=0.0)
        seen = tl.load(values + places, mask=mask, other=0).to(tl.float32)
        total = total * shrink + tl.sum(weights[:, None] * seen, 0)
        best = largest
    if SPLITS == 1:
        tl.store(out + (at * heads + head) * head_dim + dims, total / norm, mask=wide)
    else:
        part = out + ((at * heads + head) * SPLITS + split) * (head_dim + 2)
        tl.store(part + dims, total, mask=wide)
        tl.store(part + head_dim, best)
        tl.store(part + head_dim + 1, norm)


@triton.jit
def _join(parts, out, heads, head_dim, SPLITS: tl.constexpr, WIDTH: tl.constexpr):
    # One after another, so that more parts, with no tokens in them, change no bit: exp(-inf) adds 0.
    head = tl.program_id(0) * heads + tl.program_id(1)
    dims = tl.arange(0, WIDTH)
    wide = dims < head_dim
    part = parts + head * SPLITS * (head_dim + 2)
    best = tl.load(part + head_dim)
    for split in range(1, SPLITS):
        best = tl.maximum(best, tl.load(part + split * (head_dim + 2) + head_dim))
    total = tl.zeros([WIDTH], tl.float32)
    norm = tl.full([], 0.0, tl.float32)
    for split in range(SPLITS):
        one = part + split * (head_dim + 2)
        share = tl.exp(tl.load(one + head_dim) - best)
        total += share * tl.load(one + dims, mask=wide, other=0.0)
        norm += share * tl.load(one + head_dim + 1)
    tl.store(out + head * head_dim + dims, total / norm, mask=wide)
