"""Attention for the shapes that techniques leave behind, registered with transformers under one name.

Two things differ from transformers' own "sdpa":
* While decoding, the query heads that share a KV head are packed as rows of one small product, so that each K/V row is
  read once instead of once per query head (`enable_gqa` on a CPU reads them again: 3.5x slower at 2048 tokens).
* After uneven pruning the heads no longer fall into equal groups: `module.kv_of_head` then says which KV head each
  query head reads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "grouped_heads"


def grouped_heads_attention(
    module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, **_,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """query [B, Hq, T, d], key and value [B, Hkv, S, d], mask broadcastable to [B, Hq, T, S] -> [B, T, Hq, d]."""
    kv_of_head = getattr(module, "kv_of_head", None)
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


AttentionInterface.register(NAME, grouped_heads_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)  # without it the mask of a padded batch is silently None


def use_grouped_heads(model) -> None:
    """Make `model` run its attention through this file."""
    model.set_attn_implementation(NAME)
