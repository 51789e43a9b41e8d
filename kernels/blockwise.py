"""Rounding a model block by block: each layer sees the inputs that the layers rounded before it really hand on.

Llama's blocks are walked in order with the hidden states of all calibration windows kept. Within a block there are four
stages, q/k/v, o, gate/up and down, whose layers share their inputs; each stage runs the block only as far as its own layers,
sums the second moments of what reaches them (as int8 groups, which is what they will multiply) and rounds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from kernels.gptq import Form, gptq_refined
from kernels.int4 import dequantize_int4
from kernels.int8 import dequantize_groups, quantize_groups

STAGES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
# The tied table is multiplied and looked up: the second wants every weight right, so its moments are nearer the identity.
TIED_DAMPING = 0.05


class _StageEnds(Exception):
    """Raised by a hook when the inputs of a stage have been seen: the rest of the pass is not needed."""


class RoundedLinear(nn.Module):
    """y = x' W'^T + b with x' and W' rounded and dequantised: what the quantised layer computes, as one float product.

    The product is taken in bfloat16 where the CPU has matrix units for it: calibration then takes a third of the time,
    for errors far below those of the rounding itself.
    """

    def __init__(self, source: nn.Linear, weight: torch.Tensor, group_size: int):
        super().__init__()
        self.group_size, self.bias = group_size, source.bias
        self.in_features, self.out_features = source.in_features, source.out_features
        matrix_units = weight.device.type == "cpu" and torch.cpu._is_amx_tile_supported()
        self.register_buffer("weight", weight.to(torch.bfloat16 if matrix_units else torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.linear(round_inputs(x, self.group_size).to(self.weight.dtype), self.weight).to(x.dtype)
        return out if self.bias is None else out + self.bias


def round_inputs(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """x [..., K] as int8 groups show it, float32."""
    return dequantize_groups(*quantize_groups(x, group_size), group_size)


@torch.no_grad()
def round_blockwise(model, ids: torch.Tensor, *, group_size: int, damping: float, tied: bool) -> dict[str, Form]:
    """GPTQ forms of every linear layer by name, lm_head included. The model is handed back as it was.

    Args:
        model: a LlamaForCausalLM whose layers are nn.Linear.
        ids: int64 [windows, tokens] of calibration text.
        group_size, damping: as in kernels.gptq.gptq.
        tied: lm_head is the input embedding as well.
    """
    forms: dict[str, Form] = {}
    hidden, arguments = _inputs_of_blocks(model, ids)
    blocks, start = model.model.layers, time.perf_counter()
    for index, block in enumerate(blocks):
        originals = {name: block.get_submodule(name) for stage in STAGES for name in stage}
        try:
            for stage in STAGES:
                moments = _second_moments(block, stage[0], hidden, arguments, group_size)
                for name, form in _round_together([originals[name] for name in stage], moments, group_size, damping, stage):
                    forms[f"model.layers.{index}.{name}"] = form
                    dequantized = dequantize_int4(*form, group_size)
                    _set(block, name, RoundedLinear(originals[name], dequantized, group_size))
            for window in range(len(hidden)):
                hidden[window : window + 1] = _first(block(hidden[window : window + 1], **arguments))
        finally:
            for name, original in originals.items():
                _set(block, name, original)
        _progress(
            f"int4: block {index + 1} of {len(blocks)}, {time.perf_counter() - start:.0f} s", last=index + 1 == len(blocks)
        )
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


def _second_moments(block, name: str, hidden: torch.Tensor, arguments: dict, group_size: int) -> torch.Tensor:
    """Mean of x x^T, float32 [K, K], over the rounded inputs x of the layer called `name`."""
    layer = block.get_submodule(name)
    total = torch.zeros(layer.in_features, layer.in_features, device=hidden.device)

    def catch(_module, inputs):
        x = round_inputs(inputs[0], group_size).flatten(0, -2)
        total.addmm_(x.T, x)
        raise _StageEnds

    handle = layer.register_forward_pre_hook(catch)
    try:
        for window in hidden:
            _run_until_stage_ends(lambda window=window: block(window[None], **arguments))
    finally:
        handle.remove()
    return total / hidden.shape[:2].numel()


def _run_until_stage_ends(run: Callable[[], object]) -> None:
    try:
        run()
    except _StageEnds:
        return


def _round_together(layers: list[nn.Linear], moments: torch.Tensor, group_size: int, damping: float, names):
    """Yield (name, form) of layers that share their inputs: rows are rounded independently, so all at once."""
    together = torch.cat([layer.weight for layer in layers])
    form = gptq_refined(together, moments, group_size=group_size, damping=damping)
    rows = [layer.out_features for layer in layers]
    parts = zip(*(part.split(rows) for part in form), strict=True)
    for name, part in zip(names, parts, strict=True):
        yield name, tuple(tensor.contiguous() for tensor in part)


def _first(output) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _set(block, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(block.get_submodule(owner), leaf, module)


def _progress(line: str, *, last: bool) -> None:
    """One line on stderr that overwrites itself on a terminal."""
    print(line, end="\r" if sys.stderr.isatty() and not last else "\n", file=sys.stderr, flush=True)
