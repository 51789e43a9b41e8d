"""A decoder's forward pass with as few calls as it takes: eight operators a layer instead of about forty.

transformers' forward builds masks, angles and output objects and calls small operators one by one: on a small model, or on
a fast recipe, that takes longer than reading the weights. `use_lean_forward` puts a shorter pass in front of it. It serves what
`generate` and the benchmark ask for (tokens in, a cache of ours, no padding) and hands everything else to the original.
"""

from __future__ import annotations

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from devices import trim_heap
from kernels.attention import WIDEST_HEAD
from kernels.build import gpu_kernels
from kernels.fusing import fuse
from kernels.int8 import kernels_run
from kernels.kv_cache import RoomyCache
from kernels.step import FEW_ROWS, Products, add_rms_norm, attend, decoder_layer, is_packed, rope_append, silu_mul


class LeanForward:
    """The pass itself, and what it needs of each layer. `fused` counts the products that were joined."""

    def __init__(self, model):
        self.model, self.original = model, model.forward
        self.eps = model.config.rms_norm_eps
        positions = torch.arange(model.config.max_position_embeddings, device=model.device)[None]
        rotary = getattr(model.model.rotary_emb, "inner", model.model.rotary_emb)
        cos, sin = rotary(torch.empty(0, device=model.device), positions)
        half = cos.shape[-1] // 2  # both halves of a head turn by the same angles
        self.cos, self.sin = cos[0, :, :half].float().contiguous(), sin[0, :, :half].float().contiguous()
        self.layers = []
        for layer in model.model.layers:
            self.layers.append(_Layer(layer))
            trim_heap()  # joined products are new tensors; else what they replace stays resident, layer after layer
        self.final_norm = _norm_weight(model.model.norm)
        self.device_step = None
        if model.device.type == "cuda" and gpu_kernels() is None:
            from kernels.device_step import DeviceStep  # its import needs Triton

            self.device_step = DeviceStep(self)

    @property
    def fused(self) -> int:
        return sum(part is not None and len(part) == 1 for layer in self.layers for part in (layer.qkv, layer.gate_up))

    def __call__(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
        labels=None, use_cache=None, logits_to_keep=0, **options,
    ):  # fmt: skip
        """As LlamaForCausalLM.forward."""
        if (
            not isinstance(past_key_values, RoomyCache)
            or input_ids is None
            or inputs_embeds is not None
            or labels is not None
            or torch.is_grad_enabled()
            or not isinstance(logits_to_keep, int)
            or any(options.get(name) for name in ("output_attentions", "output_hidden_states"))
            or (past := past_key_values.get_seq_length()) + input_ids.shape[1] > len(self.cos)
            or not _unpadded(attention_mask, position_ids, past, input_ids.shape[1])
        ):
            return self.original(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                past_key_values=past_key_values, inputs_embeds=inputs_embeds, labels=labels, use_cache=use_cache,
                logits_to_keep=logits_to_keep, **options,
            )  # fmt: skip
        logits = self.logits(input_ids, past_key_values, last=logits_to_keep)
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)

    def logits(self, input_ids: torch.Tensor, cache: RoomyCache, *, last: int = 1) -> torch.Tensor:
        """int64 [B, T] -> [B, last, V], or of all T tokens with `last` 0; the tokens' keys and values join `cache`."""
        if self.device_step is not None and self.device_step.serves(input_ids):
            return self.device_step(input_ids, cache)[:, -last:]
        residual = self.model.get_input_embeddings()(input_ids).float().contiguous()
        update = None
        whole = input_ids.shape[1] <= FEW_ROWS and kernels_run(residual)
        for layer in self.layers:
            if layer.qkv is not None:
                stored = cache.layer(layer.cache_index)
                if whole and layer.products is not None:
                    if update is not None:
                        residual += update
                        update = None
                    decoder_layer(residual, layer, self.cos, self.sin, stored, self.eps)
                    continue
                inputs = add_rms_norm(residual, update, layer.attention_norm, self.eps)
                q = rope_append(
                    _product(layer.qkv, inputs), self.cos, self.sin, stored, kv_heads=layer.kv_heads, head_dim=layer.head_dim
                )
                if last and layer is self.layers[-1]:  # of other tokens, the last layer's keys and values are all that is read
                    q, residual = q[:, -last:].contiguous(), residual[:, -last:].contiguous()
                update = layer.o_proj(attend(q, stored, scaling=layer.scaling, kv_of_head=layer.kv_of_head)).float()
            inputs = add_rms_norm(residual, update, layer.mlp_norm, self.eps)
            update = layer.down_proj(silu_mul(*_product(layer.gate_up, inputs).chunk(2, -1))).float()
        if last:
            residual = residual[:, -last:].contiguous()
            update = None if update is None else update[:, -last:].contiguous()
        return self.model.lm_head(add_rms_norm(residual, update, self.final_norm, self.eps))


class _Layer:
    """One decoder layer's products, joined where they can be, and its numbers. `qkv` is None without attention."""

    def __init__(self, layer):
        attention, mlp = getattr(layer, "self_attn", None), layer.mlp
        self.mlp_norm = _norm_weight(layer.post_attention_layernorm)
        self.gate_up, self.down_proj = _joined([mlp.gate_proj, mlp.up_proj]), mlp.down_proj
        self.qkv = None
        if attention is None:  # layer_pruning took it: the layer is its MLP, and owns no layer of the cache
            return
        self.attention_norm = _norm_weight(layer.input_layernorm)
        self.qkv = _joined([attention.q_proj, attention.k_proj, attention.v_proj])
        self.o_proj, self.cache_index = attention.o_proj, attention.layer_idx
        self.head_dim, self.scaling = attention.head_dim, attention.scaling
        self.kv_heads = attention.k_proj.out_features // attention.head_dim
        self.kv_of_head = getattr(attention, "kv_of_head", None)
        self.norms = [self.attention_norm, self.mlp_norm]
        joined = [part[0] if len(part) == 1 else None for part in (self.qkv, [self.o_proj], self.gate_up, [self.down_proj])]
        self.products = Products(joined) if all(map(is_packed, joined)) else None


def use_lean_forward(model) -> LeanForward:
    """Make `model(...)` and `model.generate(...)` take the lean pass where it serves; last of all techniques.

    Raises ValueError for what it has no code for: another activation than Llama's, positions that depend on the length, heads
    wider than the kernels take.
    """
    config = model.config
    if config.hidden_act != "silu":
        raise ValueError(f"the lean forward pass computes silu, this model wants {config.hidden_act}")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        raise ValueError(f"the lean forward pass has fixed angles, this model's positions are '{rope}'")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim > WIDEST_HEAD:
        raise ValueError(f"the lean forward pass has room for heads of {WIDEST_HEAD}, this model's are {head_dim} wide")
    model.forward = LeanForward(model)
    return model.forward


def _joined(layers: list) -> list:
    fused = fuse(layers)
    return layers if fused is None else [fused]


def _product(layers: list, inputs: torch.Tensor) -> torch.Tensor:
    if len(layers) == 1:
        return layers[0](inputs).float()
    return torch.cat([layer(inputs) for layer in layers], -1).float()


def _norm_weight(norm) -> torch.Tensor:
    return getattr(norm, "inner", norm).weight.data.float()


def _unpadded(mask: torch.Tensor | None, positions: torch.Tensor | None, past: int, tokens: int) -> bool:
    """Whether every row begins at position 0 and has no gap, which is what the lean pass assumes."""
    if mask is not None and (mask.dim() != 2 or not mask.all()):
        return False
    if positions is None:
        return True
    return bool((positions[..., 0] == past).all()) and bool((positions[..., -1] == past + tokens - 1).all())
