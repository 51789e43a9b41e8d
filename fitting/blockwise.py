"""Rounding a model block by block: each layer sees the inputs that the layers rounded before it really hand on.

Llama's blocks are walked in order with the hidden states of all calibration windows kept. Within a block there are four
stages, q/k/v, o, gate/up and down, whose layers share their inputs; each stage runs the block only as far as its own layers,
sums the second moments of what reaches them (as int8 groups, which is what they will multiply) and rounds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from devices import has_half_arithmetic, require_float64
from fitting.calibration_cache import show_progress
from fitting.gptq import damp, gptq_refined
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


class RoundedLinear(nn.Module):
    """y = x' W'^T + b with x' and W' rounded and dequantised: what the quantised layer computes, as one float product.

    The product is taken in bfloat16 where the CPU has instructions for it: calibration then takes a third of the time,
    for errors far below those of the rounding itself.
    """

    def __init__(self, source: nn.Linear, weight: torch.Tensor, group_size: int | None):
        super().__init__()
        self.group_size, self.bias = group_size, source.bias
        self.in_features, self.out_features = source.in_features, source.out_features
        native = weight.device.type == "cpu" and has_half_arithmetic(weight.device, torch.bfloat16)[0]
        self.register_buffer("weight", weight.to(torch.bfloat16 if native else torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rounded = x if self.group_size is None else round_inputs(x, self.group_size)
        out = F.linear(rounded.to(self.weight.dtype), self.weight).to(x.dtype)
        return out if self.bias is None else out + self.bias


def round_inputs(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """x [..., K] as int8 groups show it: float32."""
    return dequantize_groups(*quantize_groups(x, group_size), group_size)


@torch.no_grad()
def round_blockwise(
    model,
    ids: torch.Tensor,
    *,
    group_size: int,
    damping: float,
    tied: bool,
    correction: float = 0.0,
) -> dict[str, Form]:
    """GPTQ forms of every linear layer by name, lm_head included. The model is handed back as it was.

    All are rounded as if all were to be int4, so that one rounding serves every choice of layers that get int8 instead.

    Args:
        model: a LlamaForCausalLM whose layers are nn.Linear.
        ids: int64 [windows, tokens] of calibration text.
        group_size, damping: as in fitting.gptq.gptq.
        tied: lm_head is the input embedding as well.
        correction: 0 to 1, how much of what the rounded layers before it did wrong each layer makes good: its weights are
            first moved towards those that give the float model's outputs on the rounded model's inputs.
    """
    require_float64(model.device)
    forms: dict[str, Form] = {}
    hidden, arguments = _inputs_of_blocks(model, ids)
    exact = hidden.clone() if correction else None
    blocks = model.model.layers
    for index, block in enumerate(blocks):
        originals = {name: block.get_submodule(name) for stage in stages_of(block) for name in stage}
        try:
            exact_inputs = _pass_exactly(block, originals, exact, arguments) if correction else {}
            for stage in stages_of(block):
                wanted = exact_inputs.pop(stage[0], None)
                moments, cross = _second_moments(block, stage[0], hidden, arguments, group_size, wanted)
                together = torch.cat([originals[name].weight for name in stage])
                if correction:
                    together = corrected(together, moments, cross, correction, damping)
                for name, form in _round_together(together, originals, moments, group_size, damping, stage):
                    forms[f"model.layers.{index}.{name}"] = form
                    block.set_submodule(name, RoundedLinear(originals[name], dequantize_int4(*form, group_size), group_size))
            for window in range(len(hidden)):
                hidden[window : window + 1] = block(hidden[window : window + 1], **arguments)
        finally:
            for name, original in originals.items():
                block.set_submodule(name, original)
        show_progress("rounding, block", index + 1, len(blocks))
    x = round_inputs(torch.cat([model.model.norm(window) for window in hidden]), group_size)
    damping = TIED_DAMPING if tied else damping
    forms["lm_head"] = gptq_refined(model.lm_head.weight, x.T @ x / len(x), group_size=group_size, damping=damping)
    return forms


def _inputs_of_blocks(model, ids: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """Hidden states float32 [windows, tokens, width] before the first block, and what else a block is called with."""
    hidden, arguments = [], {}

    def catch(_module, positional, named):
        hidden.append(positional[0])
        arguments.update(named)
        raise _StageEnds

    handle = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for window in ids:
            _run_until_stage_ends(lambda window=window: model.model(input_ids=window[None], use_cache=False))
    finally:
        handle.remove()
    return torch.cat(hidden), arguments


def _second_moments(block, name: str, hidden, arguments: dict, group_size: int, exact_inputs: torch.Tensor | None):
    """Mean of x x^T, float32 [K, K], over the rounded inputs x of the layer called `name`; and of e x^T, where e are the
    inputs [windows * tokens, K] of the float model at the same tokens (None without them)."""
    layer = block.get_submodule(name)
    total = torch.zeros(layer.in_features, layer.in_features, device=hidden.device)
    cross = None if exact_inputs is None else torch.zeros_like(total)
    seen = 0

    def catch(_module, inputs):
        nonlocal seen
        x = round_inputs(inputs[0], group_size).flatten(0, -2)
        total.addmm_(x.T, x)
        if cross is not None:
            cross.addmm_(exact_inputs[seen : seen + len(x)].float().T, x)
        seen += len(x)
        raise _StageEnds

    handle = layer.register_forward_pre_hook(catch)
    try:
        for window in hidden:
            _run_until_stage_ends(lambda window=window: block(window[None], **arguments))
    finally:
        handle.remove()
    return total / seen, None if cross is None else cross / seen


def corrected(weight: torch.Tensor, moments: torch.Tensor, cross: torch.Tensor, share: float, damping: float) -> torch.Tensor:
    """The weight moved by `share` towards W* of least mean (W e - W* x)^2: W* = W E[e x^T] E[x x^T]^-1, damped.

    As in QEP (Arai and Ichikawa 2025: https://arxiv.org/abs/2504.09629). float32 [N, K].
    """
    pull = (weight @ (cross - moments)).double().T
    return weight + share * torch.linalg.solve(damp(moments, damping).double(), pull).T.float()


def _pass_exactly(block, originals: dict, exact: torch.Tensor, arguments: dict) -> dict[str, torch.Tensor]:
    """Moves `exact`, the float model's hidden states, through the block; what each stage sees: bfloat16 [tokens, K]."""
    seen: dict[str, list] = {stage[0]: [] for stage in stages_of(block)}
    for name, original in originals.items():
        block.set_submodule(name, RoundedLinear(original, original.weight, None))
    handles = [
        block.get_submodule(name).register_forward_pre_hook(lambda _, x, name=name: seen[name].append(x[0][0].bfloat16()))
        for name in seen
    ]
    for window in range(len(exact)):
        exact[window : window + 1] = block(exact[window : window + 1], **arguments)
    for handle in handles:
        handle.remove()
    for name, original in originals.items():
        block.set_submodule(name, original)
    return {name: torch.cat(parts) for name, parts in seen.items()}


def _run_until_stage_ends(run: Callable[[], object]) -> None:
    try:
        run()
    except _StageEnds:
        return


def _round_together(weight: torch.Tensor, originals: dict, moments, group_size: int, damping: float, names):
    """Yield (name, form) of layers that share their inputs: rows are rounded independently, so all at once."""
    form = gptq_refined(weight, moments, group_size=group_size, damping=damping)
    rows = [originals[name].out_features for name in names]
    parts = zip(*(part.split(rows) for part in form), strict=True)
    for name, part in zip(names, parts, strict=True):
        yield name, tuple(tensor.contiguous() for tensor in part)
