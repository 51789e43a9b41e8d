"""Rounding a model block by block: each layer sees the inputs that the layers rounded before it really hand on.

Llama's blocks are walked in order with the hidden states of all calibration windows kept. Within a block there are four
stages, q/k/v, o, gate/up and down, whose layers share their inputs; each stage runs the block only as far as its own layers,
sums the second moments of what reaches them (as int8 groups, which is what they will multiply) and rounds.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import nn

from devices import has_half_arithmetic, require_float64
from fitting.calibration_cache import show_progress
from fitting.divergence import layer_arguments
from fitting.gptq import gptq_refined
from kernels.int4 import Form, dequantize_int4
from kernels.int8 import dequantize_groups, quantize_groups

STAGES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
# The tied table is multiplied and looked up: the second wants every weight right, so its moments are nearer the identity.
TIED_DAMPING = 0.05


def stages_of(block) -> list[tuple[str, ...]]:
    """The stages of one decoder layer that are there: layer_pruning may have taken its attention."""
    return [stage for stage in STAGES if hasattr(block, stage[0].partition(".")[0])]


class _StageEnds(Exception):
    """Raised by a hook when the inputs of a stage have been seen: the rest of the pass is not needed."""


class RoundedInputs(torch.autograd.Function):
    """x [..., K] as int8 groups show it; the gradient passes as if nothing had been rounded (straight-through)."""

    @staticmethod
    def forward(_ctx, x: torch.Tensor, group_size: int, dtype: torch.dtype) -> torch.Tensor:
        return dequantize_groups(*quantize_groups(x, group_size), group_size).to(dtype)

    @staticmethod
    def backward(_ctx, gradient: torch.Tensor):
        return gradient, None, None


class RoundedLinear(nn.Module):
    """y = x' W'^T + b with x' and W' rounded and dequantised: what the quantised layer computes, as one product in `dtype`.

    In bfloat16, where there are instructions for it, calibration takes a third of the time, for errors far below those of
    the rounding itself.
    """

    def __init__(self, source: nn.Linear, weight: torch.Tensor, group_size: int, dtype: torch.dtype):
        super().__init__()
        self.group_size, self.bias = group_size, source.bias
        self.register_buffer("weight", weight.to(dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.linear(RoundedInputs.apply(x, self.group_size, self.weight.dtype), self.weight).to(x.dtype)
        return out if self.bias is None else out + self.bias

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        return self.weight[ids].float()


@torch.no_grad()
def round_blockwise(model, ids: torch.Tensor, *, group_size: int, damping: float, tied: bool) -> dict[str, Form]:
    """GPTQ forms of every linear layer by name, lm_head included. The model is handed back as it was.

    All are rounded as if all were to be int4, so that one rounding serves every choice of layers that get int8 instead.

    Args:
        model: a LlamaForCausalLM whose layers are nn.Linear.
        ids: int64 [windows, tokens] of calibration text.
        group_size, damping: as in fitting.gptq.gptq.
        tied: lm_head is the input embedding as well.
    """
    require_float64(model.device)
    forms: dict[str, Form] = {}
    native = model.device.type == "cpu" and has_half_arithmetic(model.device, torch.bfloat16)[0]
    dtype = torch.bfloat16 if native else torch.float32
    hidden = model.model.embed_tokens(ids)
    arguments = layer_arguments(model, hidden)
    blocks = model.model.layers
    for index, block in enumerate(blocks):
        originals = {name: block.get_submodule(name) for stage in stages_of(block) for name in stage}
        try:
            for stage in stages_of(block):
                moments = _second_moments(block, stage[0], hidden, arguments, group_size)
                together = torch.cat([originals[name].weight for name in stage])
                for name, form in _round_together(together, originals, moments, group_size, damping, stage):
                    forms[f"model.layers.{index}.{name}"] = form
                    weight = dequantize_int4(*form, group_size)
                    block.set_submodule(name, RoundedLinear(originals[name], weight, group_size, dtype))
            for window in range(len(hidden)):
                hidden[window : window + 1] = block(hidden[window : window + 1], **arguments)
        finally:
            for name, original in originals.items():
                block.set_submodule(name, original)
        show_progress("rounding, block", index + 1, len(blocks))
    x = RoundedInputs.apply(torch.cat([model.model.norm(window) for window in hidden]), group_size, torch.float32)
    damping = TIED_DAMPING if tied else damping
    forms["lm_head"] = gptq_refined(model.lm_head.weight, x.T @ x / len(x), group_size=group_size, damping=damping)
    return forms


def _second_moments(block, name: str, hidden: torch.Tensor, arguments: dict, group_size: int) -> torch.Tensor:
    """Mean of x x^T, float32 [K, K], over the rounded inputs x of the layer called `name`."""
    layer, tokens = block.get_submodule(name), hidden[..., 0].numel()
    total = torch.zeros(layer.in_features, layer.in_features, device=hidden.device)

    def catch(_module, inputs):
        x = RoundedInputs.apply(inputs[0], group_size, torch.float32).flatten(0, -2)
        total.addmm_(x.T, x)
        raise _StageEnds

    handle = layer.register_forward_pre_hook(catch)
    try:
        for window in hidden:
            with contextlib.suppress(_StageEnds):
                block(window[None], **arguments)
    finally:
        handle.remove()
    return total / tokens


def _round_together(weight: torch.Tensor, originals: dict, moments, group_size: int, damping: float, names):
    """Yield (name, form) of layers that share their inputs: rows are rounded independently, so all at once."""
    form = gptq_refined(weight, moments, group_size=group_size, damping=damping)
    rows = [originals[name].out_features for name in names]
    parts = zip(*(part.split(rows) for part in form), strict=True)
    for name, part in zip(names, parts, strict=True):
        yield name, tuple(tensor.contiguous() for tensor in part)
