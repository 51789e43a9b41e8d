"""Outlier migration: scale channels of activations down and the weights that read them up; exact arithmetic sees no change.

x W^T = (x / s) (W * s)^T for any positive s, one factor per input channel. The division is free where it folds into what
produces x: an RMSNorm's weight (for q, k and v; for gate and up; for lm_head), rows of up_proj (for down_proj), rows
of v_proj (for o_proj). Formula of Xiao et al. 2022 (SmoothQuant), eq. 4: s = absmax(x)^strength / absmax(W)^(1 - strength).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from fitting.calibration import watch_inputs
from fitting.calibration_cache import CalibrationCache
from kernels.modules import is_tied

STRENGTH, CALIBRATION_TOKENS = 0.7, 16384  # what loses least on held-out text; enough tokens to meet the outliers
SMALLEST = 1e-5  # of an absmax: a channel that is never used must not get an infinite factor


@dataclass(frozen=True)
class Seam:
    """Where a factor per channel folds in: `source` produces what `readers` read.

    `source` is an RMSNorm or an nn.Linear; `copies` maps each input channel of the readers to the output channel of the
    source that it is a copy of: int64 [K], several to one where query heads share a KV head. None: channel by channel.
    """

    name: str
    source: nn.Module
    readers: tuple[nn.Linear, ...]
    copies: torch.Tensor | None = None


def seams(model) -> Iterator[Seam]:
    """Every seam of a Llama, in order of execution. The last, norm to lm_head, only where the two tables are not tied:
    a tied table is the input embedding as well, which has no factor to undo."""
    for index, block in enumerate(model.model.layers):
        attention, mlp, name = getattr(block, "self_attn", None), block.mlp, f"model.layers.{index}."
        if attention is not None:  # layer_pruning may have taken it
            yield Seam(name + "attention", block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj))
            yield Seam(name + "o_proj", attention.v_proj, (attention.o_proj,), _copied_channels(attention))
        yield Seam(name + "mlp", block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj))
        yield Seam(name + "down_proj", mlp.up_proj, (mlp.down_proj,))
    if not is_tied(model):
        yield Seam("lm_head", model.model.norm, (model.lm_head,))


def _copied_channels(attention) -> torch.Tensor:
    """Which channel of v_proj each input channel of o_proj is an average of: int64 [inputs of o_proj]."""
    device = attention.v_proj.weight.device
    channels = torch.arange(attention.v_proj.out_features, device=device).view(-1, attention.head_dim)
    kv_of_head = getattr(attention, "kv_of_head", None)  # set where heads were pruned unevenly
    if kv_of_head is None:
        readers = attention.o_proj.in_features // attention.v_proj.out_features
        kv_of_head = torch.arange(len(channels), device=device).repeat_interleave(readers)
    return channels[kv_of_head].flatten()


def input_absmax(run: Callable[[], None], seams: list[Seam]) -> list[torch.Tensor]:
    """Largest absolute input per channel of each seam's readers while `run()` runs: float32 [K] each, in order."""
    largest = [torch.zeros(seam.readers[0].in_features, device=seam.readers[0].weight.device) for seam in seams]

    def take(index: int, x: torch.Tensor) -> None:
        torch.maximum(largest[index], x.abs().amax(0), out=largest[index])

    watch_inputs(run, [seam.readers[0] for seam in seams], take)
    return largest


def smoothing_factors(x_absmax: torch.Tensor, w_absmax: torch.Tensor, strength: float) -> torch.Tensor:
    """s = x_absmax^strength / w_absmax^(1 - strength), float32 [K], scaled so that its geometric mean is 1.

    The scale of all factors together cancels in exact arithmetic and in every quantiser; a mean of 1 keeps the weights of the
    source in their usual range. `strength` 0 gives ones: nothing is migrated.
    """
    if strength == 0:
        return torch.ones_like(x_absmax)
    log = strength * x_absmax.clamp_min(SMALLEST).log() - (1 - strength) * w_absmax.clamp_min(SMALLEST).log()
    return (log - log.mean()).exp()


@torch.no_grad()
def migrate(seam: Seam, x_absmax: torch.Tensor, strength: float) -> torch.Tensor:
    """Folds the factors of one seam in, in place; returns them: float32, one per output channel of the source."""
    w_absmax = torch.stack([reader.weight.float().abs().amax(0) for reader in seam.readers]).amax(0)
    if seam.copies is not None:
        channels = seam.source.weight.shape[0]
        x_absmax, w_absmax = (
            torch.zeros(channels, device=v.device).scatter_reduce(0, seam.copies, v, "amax") for v in (x_absmax, w_absmax)
        )
    factors = smoothing_factors(x_absmax, w_absmax, strength)
    fold(seam, factors)
    return factors


@torch.no_grad()
def fold(seam: Seam, factors: torch.Tensor) -> None:
    """Divides what the source produces by `factors`, one per output channel, and multiplies what the readers do with it."""
    source = seam.source
    factors = factors.to(source.weight.device)
    _put(source, "weight", source.weight / (factors[:, None] if source.weight.dim() == 2 else factors))
    if getattr(source, "bias", None) is not None:
        _put(source, "bias", source.bias / factors)
    per_input = factors if seam.copies is None else factors[seam.copies]
    for reader in seam.readers:
        _put(reader, "weight", reader.weight * per_input)


def _put(module: nn.Module, name: str, values: torch.Tensor) -> None:
    """A new parameter in the place and dtype of the old one, which another model may share."""
    setattr(module, name, nn.Parameter(values.to(getattr(module, name).dtype), requires_grad=False))


def smooth(model, ids: torch.Tensor, strength: float) -> str:
    """Migrates the outliers that token windows `ids` int64 [windows, window] show, in place; returns what was done."""
    places, cache = list(seams(model)), CalibrationCache.of(model, ids, code=("smoothing.py",))
    largest = cache.tensors("absmax", model.device)
    if largest is None or len(largest) != len(places):
        network = model.model if is_tied(model) else model  # a tied lm_head has no seam: its logits need not be computed
        found = input_absmax(lambda: [network(input_ids=window[None], use_cache=False) for window in ids], places)
        largest = {place.name: x_absmax for place, x_absmax in zip(places, found, strict=True)}
        cache.save_tensors("absmax", largest)
    for place in places:
        migrate(place, largest[place.name], strength)
    tied = "; lm_head is tied to the input embedding and stays as it is" if is_tied(model) else ""
    text = "random ids" if model.source.random_weights else "calibration text"
    blocks = len(model.model.layers)
    return f"smoothed {len(places)} inputs of {blocks} blocks, strength {strength:g}, {ids.numel()} tokens of {text}{tied}"
