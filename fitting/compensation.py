"""Refitting every layer that writes to the residual stream, in order, after parts of the model were removed.

Layers are visited from first to last with two residual streams side by side: the dense model's and the pruned one's. Once
a layer has been cut, o_proj and down_proj are refitted so that the pruned stream comes as near as possible to the dense one:
their inputs are what the pruned model really computes, their target is the dense stream minus what the pruned stream holds
already. So a later layer also makes good, as far as it can, what earlier ones lost. No second model is held.
A token's error is divided by the length of its dense stream, as the next RMSNorm will divide it: a first token, whose stream
some models make a hundred times longer than any other, would else outweigh all of its window.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from devices import require_float64
from fitting.calibration_cache import CalibrationCache, show_progress
from fitting.divergence import layer_arguments
from fitting.refit import Regression, fit_ridge

BATCH_WINDOWS = 4
HELD_OUT_EVERY = 8  # one window in eight chooses the damping
TINY = torch.finfo(torch.float32).tiny
WRITERS = {"attention": "self_attn.o_proj", "mlp": "mlp.down_proj"}


@torch.no_grad()  # not inference mode: what is made here may be trained afterwards
def refit_in_order(
    model, windows: torch.Tensor, *, cut: Callable[[int], dict[str, torch.Tensor]], cache: CalibrationCache
) -> None:
    """Cut and refit all layers in place. windows int64 [W, T], at least 2; `cut(index)` removes what is to go from one layer.

    `cut` returns the input columns that each writer ("attention", "mlp") may use, int64 [kept], where it may not use all.
    What `cache` holds of a layer is taken from there; with all layers cached the text is not read at all.
    The weights keep their dtypes and biases; only input columns that `cut` removed are gone.
    """
    if len(windows) < 2:
        raise ValueError("refitting needs two calibration windows: one to fit, one to choose the damping")
    layers = model.model.layers
    cached = [cache.tensors(f"layer-{index:03d}") for index in range(len(layers))]
    if all(cached):
        for index, (layer, weights) in enumerate(zip(layers, cached, strict=True)):
            columns = cut(index)
            for part in WRITERS:
                _set_weight(layer, part, weights[part], columns.get(part))
        return
    require_float64(model.device)
    dense = model.model.embed_tokens(windows)
    pruned = dense.clone()
    context = layer_arguments(model, dense)
    for index, layer in enumerate(layers):
        # The layer runs whole before it is cut, and both sublayers' targets are needed: one more copy, of one layer only.
        middle = _advance(dense, layer, "attention", context)
        after = _advance(middle, layer, "mlp", context)
        columns, weights = cut(index), cached[index] or {}
        for part, target in (("attention", middle), ("mlp", after)):
            weights[part] = _refit_writer(layer, part, pruned, target, columns.get(part), context, weights.get(part))
        cache.save_tensors(f"layer-{index:03d}", weights)
        dense = after
        show_progress("refitting", index + 1, len(layers))


def _advance(stream: torch.Tensor, layer, part: str, context: dict) -> torch.Tensor:
    return torch.cat([rows + _sublayer(layer, part, rows, context) for rows in stream.split(BATCH_WINDOWS)])


def _sublayer(layer, part: str, rows: torch.Tensor, context: dict) -> torch.Tensor:
    """What one sublayer adds to the residual stream [B, T, H]."""
    if part == "attention":
        return layer.self_attn(layer.input_layernorm(rows), **context)[0]
    return layer.mlp(layer.post_attention_layernorm(rows))


def _refit_writer(layer, part, pruned, target, columns, context, known: torch.Tensor | None) -> torch.Tensor:
    """Refit one writer on the pruned stream [W, T, H] (or take the `known` weight), then advance that stream in place.

    Returns the weight of the columns that may be used, [N, kept].
    """
    writer = layer.get_submodule(WRITERS[part])
    kept = slice(None) if columns is None else columns
    inputs = _inputs_of(writer, layer, part, pruned, context)
    if known is None:
        train, held_out = Regression(), Regression()
        bias = 0 if writer.bias is None else writer.bias
        for index, (x, rows, goal) in enumerate(zip(inputs, pruned, target, strict=True)):
            moments = held_out if index % HELD_OUT_EVERY == HELD_OUT_EVERY // 2 or index == len(inputs) - 1 else train
            scale = goal.float().square().mean(-1, keepdim=True).clamp_min(TINY).rsqrt()
            moments.add(x[:, kept].float() * scale, (goal - rows - bias).float() * scale)
        known = fit_ridge(train, held_out, writer.weight[:, kept])
    _set_weight(layer, part, known, columns)
    for rows, x in zip(pruned.split(BATCH_WINDOWS), inputs.split(BATCH_WINDOWS), strict=True):
        rows += writer(x)
    return known


def _inputs_of(writer, layer, part, stream, context) -> torch.Tensor:
    """What reaches `writer` when one sublayer runs on the stream, [W, T, K]."""
    seen: list[torch.Tensor] = []
    handle = writer.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    try:
        for rows in stream.split(BATCH_WINDOWS):
            _sublayer(layer, part, rows, context)
    finally:
        handle.remove()
    return torch.cat(seen)


def _set_weight(layer, part: str, weight: torch.Tensor, columns: torch.Tensor | None) -> None:
    writer = layer.get_submodule(WRITERS[part])
    if columns is None:
        full = weight.to(writer.weight.device)
    else:
        full = torch.zeros_like(writer.weight)
        full[:, columns] = weight.to(full.device)
    writer.weight = nn.Parameter(full, requires_grad=False)  # not written into: other models may share the old tensor
