"""Attention for the shapes that techniques leave behind, registered with transformers under one name.

Three things differ from transformers' own "sdpa":
* While decoding, the query heads that share a KV head are packed as rows of one small product, so that each K/V row is
  read once instead of once per query head (`enable_gqa` on a CPU reads them again: 3.5x slower at 2048 tokens).
* After uneven pruning the heads no longer fall into equal groups: `module.kv_of_head` then says which KV head each
  query head reads. Where the kernels run, a token's attention reads K and V in place (attention.cpp); elsewhere they are
  gathered for each query head.
* Where the kernels run, an unpadded prompt goes through prompt_attention.cpp.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from kernels.int8 import kernels_run
from kernels.step import attention_kernel

NAME = "grouped_heads"
WIDEST_HEAD = 256  # what the kernels have room for (attention.cpp)


def grouped_heads_attention(
    module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, **_,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """query [B, Hq, T, d], key and value [B, Hkv, S, d], mask broadcastable to [B, Hq, T, S] -> [B, T, Hq, d]."""
    kv_of_head = getattr(module, "kv_of_head", None)
    wanted = query.shape[2] > 1 or kv_of_head is not None  # a token's even groups are faster packed
    if wanted and kernels_serve(query, key, value, attention_mask, dropout):
        kernel = attention_kernel(query.shape[2])
        rows, keys, values = query.transpose(1, 2).contiguous(), key.contiguous(), value.contiguous()
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        output = kernel(rows, keys, values, None, None, key.shape[2], scaling, kv_of_head)
        return output.unflatten(-1, (query.shape[1], query.shape[3])), None
    if kv_of_head is not None:
        key, value = key[:, kv_of_head], value[:, kv_of_head]
    batch_size, query_heads, length, head_dim = query.shape
    kv_heads = key.shape[1]
    if length == 1 and query_heads != kv_heads:
        packed = query.view(batch_size, kv_heads, query_heads // kv_heads, head_dim)
        output = F.scaled_dot_product_attention(packed, key, value, attn_mask=attention_mask, scale=scaling)
        output = output.reshape(batch_size, query_heads, 1, head_dim)
    else:
        causal = attention_mask is None and length > 1
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling, is_causal=causal,
            enable_gqa=query_heads != kv_heads,
        )  # fmt: skip
    return output.transpose(1, 2).contiguous(), None


def kernels_serve(query, key, value, mask: torch.Tensor | None, dropout: float) -> bool:
    """Whether the kernels can take this call: float32 on a CPU, no padding, and nothing that is to be learnt from it."""
    exact = all(states.dtype == torch.float32 for states in (query, key, value)) and mask is None and dropout == 0
    return exact and not torch.is_grad_enabled() and kernels_run(query) and query.shape[-1] <= WIDEST_HEAD


AttentionInterface.register(NAME, grouped_heads_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)  # without it the mask of a padded batch is silently None


def use_grouped_heads(model) -> None:
    """Make `model` run its attention through this file."""
    model.set_attn_implementation(NAME)
