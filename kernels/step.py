"""What a decoder layer does between its products, each with a slow twin in PyTorch: norm, positions, attention, gate.

The kernels (layer.cpp, attention.cpp) save calls, not arithmetic: at one token a step, a dozen small operators a layer cost
more time than their numbers. A prompt's attention is arithmetic, and has a kernel for that (prompt_attention.cpp). All work
on float32 activations; the cache may hold float32, bfloat16 or int8 (kernels/kv_cache.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.int8 import kernels_run

FEW_ROWS = 16  # more query rows are a prompt's: their attention is bound by arithmetic, not by reading the cache


class Products:
    """Four packed products of a layer (qkv, o, gate_up, down) as one call of the kernel takes them."""

    def __init__(self, layers: list):
        self.packed = [layer.weight.data for layer in layers]
        self.scales = [getattr(layer, "scale", None) for layer in layers]
        self.minimums = [getattr(layer, "minimum", None) for layer in layers]
        self.kinds = [_kind(layer) for layer in layers]
        self.outputs = [layer.out_features for layer in layers]
        self.groups = [getattr(layer, "group_size", layer.in_features) for layer in layers]


def is_packed(layer) -> bool:
    """Whether the kernels multiply with this layer's weights themselves."""
    weight = getattr(layer, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.dim() == 4 and layer.bias is None


def _kind(layer) -> int:
    """The number that layer.cpp knows the layer's product by."""
    if layer.weight.dtype == torch.bfloat16:
        return 3
    return 2 if layer.weight.dtype == torch.uint8 else 0 if layer.int8_activations else 1


def decoder_layer(residual: torch.Tensor, layer, cos: torch.Tensor, sin: torch.Tensor, stored, eps: float) -> None:
    """A whole layer in one call, for few tokens: residual float32 [B, T, H] in place. Its twin is the loop in lean.py."""
    batch_size, tokens, _ = residual.shape
    past = stored.length
    stored.make_room(batch_size, layer.kv_heads, tokens, layer.head_dim, device=residual.device, dtype=torch.float32)
    stored.length = past + tokens
    products = layer.products
    torch.ops.tinyopt.decoder_layer(
        residual, layer.norms, products.packed, products.scales, products.minimums, products.kinds, products.outputs,
        products.groups, cos, sin, stored.keys, stored.values, *stored.scales(), past, layer.scaling, eps, layer.kv_of_head,
    )  # fmt: skip


def add_rms_norm(residual: torch.Tensor, update: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Adds `update` to `residual` [..., H] in place and returns its RMSNorm times `weight` [H] (Zhang and Sennrich 2019)."""
    if kernels_run(residual):
        return torch.ops.tinyopt.add_rms_norm(residual, update, weight, eps)
    if update is not None:
        residual.add_(update)
    return weight * (residual * torch.rsqrt(residual.square().mean(-1, keepdim=True) + eps))


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up in one pass, float32 [..., I]; the halves of one tensor will do."""
    if gate.dtype == torch.float32 and kernels_run(gate):
        return torch.ops.tinyopt.silu_mul(gate, up)
    return F.silu(gate) * up


def rope_append(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layer, *, kv_heads: int, head_dim: int
) -> torch.Tensor:
    """Turns q and k to their positions and puts k and v into the cache.

    Args:
        qkv: float32 [B, T, (Hq + 2 Hkv) * d], the products of one layer's three projections side by side.
        cos, sin: float32 [positions, d / 2].
        layer: the cache's layer (RoomyLayer), which holds `layer.length` tokens and holds T more afterwards.

    Returns:
        q float32 [B, T, Hq, d].
    """
    batch_size, tokens, width = qkv.shape
    past = layer.length
    layer.make_room(batch_size, kv_heads, tokens, head_dim, device=qkv.device, dtype=torch.float32)
    layer.length = past + tokens
    if kernels_run(qkv):
        return torch.ops.tinyopt.rope_append(qkv, cos, sin, layer.keys, layer.values, *layer.scales(), past)
    heads = qkv.view(batch_size, tokens, width // head_dim, head_dim)
    turned, values = heads[:, :, :-kv_heads], heads[:, :, -kv_heads:]
    first, second = turned.chunk(2, -1)
    cos, sin = cos[past : past + tokens, None], sin[past : past + tokens, None]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    layer.keep(slice(past, past + tokens), turned[:, :, -kv_heads:].transpose(1, 2), values.transpose(1, 2))
    return turned[:, :, :-kv_heads].contiguous()


def attend(q: torch.Tensor, layer, *, scaling: float, kv_of_head: torch.Tensor | None = None) -> torch.Tensor:
    """Attention of the newest T tokens, q float32 [B, T, Hq, d], over all of `layer`: float32 [B, T, Hq * d].

    `kv_of_head` int64 [Hq] says which KV head each query head reads, where they are no equal groups.
    """
    if kernels_run(q):
        kernel = attention_kernel(q.shape[1])
        return kernel(q, layer.keys, layer.values, *layer.scales(), layer.length, scaling, kv_of_head)
    return attend_reference(q, layer, scaling=scaling, kv_of_head=kv_of_head)


def attention_kernel(rows: int):
    """The operator for so many query rows. Both take (q [B, T, Hq, d], keys, values, key_scale, value_scale, length, scaling,
    kv_of_head); the one for few gives a row the same bits whatever rows come with it."""
    return torch.ops.tinyopt.attend if rows <= FEW_ROWS else torch.ops.tinyopt.attend_prompt


def attend_reference(q: torch.Tensor, layer, *, scaling: float, kv_of_head: torch.Tensor | None = None) -> torch.Tensor:
    """The twin of attend, over keys and values expanded to float32."""
    keys, values = layer.expanded()
    if kv_of_head is not None:
        keys, values = keys[:, kv_of_head], values[:, kv_of_head]
    tokens, length = q.shape[1], keys.shape[2]
    mask = None
    if 1 < tokens < length:
        mask = torch.ones(tokens, length, dtype=torch.bool, device=q.device).tril(length - tokens)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), keys, values, attn_mask=mask, is_causal=tokens == length > 1, scale=scaling,
        enable_gqa=keys.shape[1] != q.shape[2],
    )  # fmt: skip
    return out.transpose(1, 2).flatten(2)
