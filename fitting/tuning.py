"""Tuning the grids of an int4 model: its scales, minimums and norms learn the float model's answers; its codes stay.

GPTQ minds the outputs of one layer at a time; what the errors of all layers do to the answer together it cannot see. A grid
can still move once the codes are found, 2 numbers for a group of weights, and so can the norms: a few dozen steps on the KL
divergence from the float model (end-to-end training of step sizes, Chen et al. 2024, EfficientQAT, section 3.3:
https://arxiv.org/abs/2407.11062) take back a good part of the loss, and neither bytes nor speed change.
A few windows are never trained on; the grids that did best there are the ones kept.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import nn

from devices import has_half_arithmetic
from fitting.blockwise import RoundedInputs, RoundedLinear
from fitting.calibration_cache import show_progress
from fitting.healing import Teacher, held_out_and_trained
from kernels.int4 import LEVELS, Form
from kernels.int8 import dequantize_groups, quantize_groups
from kernels.modules import SharedTable

HELD_OUT_MOST = 4
LEARNING_RATE = 3e-3  # of a step between two levels, or of the mean weight of a norm, at each optimizer step
WIDE_APART = 0.12  # nats per token from the float model: nearer ones, with less to gain, learn slower in proportion
CHECKS = 2  # held-out readings, spread evenly over the steps


class _GridProduct(torch.autograd.Function):
    """x W'^T with W' = levels * scale + center for each group, without keeping W' for the way back.

    x [T, K], levels int8 [N, K] (twice the distance of a code from the middle of its group), scale and center [N, G].
    """

    @staticmethod
    def forward(ctx, x, levels, scale, center, group_size: int):
        ctx.save_for_backward(x, levels, scale, center)
        ctx.group_size = group_size
        return F.linear(x, on_grid(levels, scale, center, group_size).to(x.dtype))

    @staticmethod
    def backward(ctx, gradient):
        x, levels, scale, center = ctx.saved_tensors
        size, groups = ctx.group_size, scale.shape[1]
        gradient = gradient.to(x.dtype)
        by_input = gradient @ on_grid(levels, scale, center, size).to(x.dtype) if ctx.needs_input_grad[0] else None
        sums = _per_group(x.float(), size, groups)
        by_weight = gradient.T @ x
        by_scale = 0.5 * _per_group(by_weight * levels, size, groups).float()
        return by_input, None, by_scale, gradient.float().T @ sums, None


def on_grid(levels: torch.Tensor, scale: torch.Tensor, center: torch.Tensor, group_size: int) -> torch.Tensor:
    """float32 [N, K]: 0.5 * levels * scale + center, scale and center repeated over each group of inputs."""
    missing = -levels.shape[1] % group_size
    grouped = F.pad(levels, (0, missing)).unflatten(1, (-1, group_size))
    weight = torch.addcmul(center.unsqueeze(-1), grouped.float(), scale.unsqueeze(-1), value=0.5)
    return weight.flatten(1)[:, : levels.shape[1]]


def _per_group(values: torch.Tensor, group_size: int, groups: int) -> torch.Tensor:
    """Sums over groups of the last axis: [M, K] -> [M, G]."""
    return F.pad(values, (0, groups * group_size - values.shape[1])).unflatten(1, (groups, group_size)).sum(-1)


class TunableLinear(nn.Module):
    """An int4 layer whose scales may learn. `scale` and `center`, float32 [N, G], count in steps of the grid that came:
    both are what is added to it, 0 at first, so that one learning rate suits all layers."""

    def __init__(self, linear: nn.Linear, form: Form, group_size: int, dtype: torch.dtype):
        super().__init__()
        codes, scale, minimum = form
        self.group_size, self.dtype, self.bias = group_size, dtype, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("levels", codes.to(torch.int8).mul_(2).sub_(LEVELS))
        self.register_buffer("step", scale.float())
        self.register_buffer("middle", minimum.float() + scale.float() * (LEVELS / 2))
        self.scale = nn.Parameter(torch.zeros_like(self.step))
        self.center = nn.Parameter(torch.zeros_like(self.step))

    def grid(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and middle of each group as the bfloat16 pair that will be stored gives them; gradients pass through."""
        scale, minimum = self.stored()
        exact_scale = self.step * (1 + self.scale)
        exact_center = self.middle + self.step * self.center
        center = minimum.float() + scale.float() * (LEVELS / 2)
        return exact_scale + (scale.float() - exact_scale).detach(), exact_center + (center - exact_center).detach()

    @torch.no_grad()
    def stored(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and minimum, bfloat16 [N, G]."""
        scale = (self.step * (1 + self.scale)).clamp_min(0).bfloat16()
        return scale, (self.middle + self.step * self.center - scale.float() * (LEVELS / 2)).bfloat16()

    def form(self) -> Form:
        return (self.levels.short().add_(LEVELS) // 2).to(torch.uint8), *self.stored()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rounded = RoundedInputs.apply(x, self.group_size, self.dtype).flatten(0, -2)
        out = _GridProduct.apply(rounded, self.levels, *self.grid(), self.group_size).unflatten(0, x.shape[:-1]).to(x.dtype)
        return out if self.bias is None else out + self.bias

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        scale, center = self.grid()
        chosen, flat = ids.flatten(), ids.shape
        return on_grid(self.levels[chosen], scale[chosen], center[chosen], self.group_size).unflatten(0, flat)


def tune(
    model, ids: torch.Tensor, forms: dict[str, Form], *, group_size: int, steps: int, tied: bool
) -> tuple[dict[str, Form], dict[str, torch.Tensor]]:
    """The forms by layer name and the weights of norms by parameter name after `steps` optimizer steps, a window each.

    The model is handed back as it was.

    Args:
        model: a LlamaForCausalLM whose layers are nn.Linear; those without a form are taken for int8.
        ids: int64 [windows, tokens] of calibration text, two or more.
        forms: as from fitting.blockwise.round_blockwise.
        tied: lm_head is the input embedding as well.
    """
    dtype = torch.bfloat16 if has_half_arithmetic(model.device, torch.bfloat16)[0] else torch.float32
    teacher = Teacher(model, ids)
    norms = {name: parameter for name, parameter in model.named_parameters() if name.endswith("norm.weight")}
    exact = {name: norm.detach().clone() for name, norm in norms.items()}
    originals = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    embedding = model.get_input_embeddings()
    try:
        for name, linear in originals.items():
            model.set_submodule(name, TunableLinear(linear, forms[name], group_size, dtype) if name in forms
                                else _int8(linear, group_size, dtype))  # fmt: skip
        if tied:
            model.set_input_embeddings(SharedTable(model.lm_head))
        first, last = _train(model, teacher, list(norms.values()), steps=steps)
        tuned = {name: model.get_submodule(name).form() for name in forms}
        learnt = {name: norm.detach().clone() for name, norm in norms.items()}
    finally:
        for name, linear in originals.items():
            model.set_submodule(name, linear)
        model.set_input_embeddings(embedding)
        with torch.no_grad():
            for name, norm in norms.items():
                norm.requires_grad_(False).copy_(exact[name])
    print(f"int4: held-out KL to the float model {first:.4f} -> {last:.4f} nats per token", file=sys.stderr, flush=True)
    return tuned, learnt


def _int8(linear: nn.Linear, group_size: int, dtype: torch.dtype) -> RoundedLinear:
    weight = dequantize_groups(*quantize_groups(linear.weight, group_size, torch.bfloat16), group_size)
    return RoundedLinear(linear, weight, group_size, dtype)


def _train(model, teacher: Teacher, norms: list, *, steps: int) -> tuple[float, float]:
    """Leaves the grids and norms that did best on held-out windows in the model; divergence there before and after."""
    held, train = held_out_and_trained(len(teacher.windows), HELD_OUT_MOST)
    grids = [part for module in model.modules() if isinstance(module, TunableLinear) for part in (module.scale, module.center)]
    learning = [*grids, *(norm.requires_grad_(True) for norm in norms)]
    first = best = teacher.mean_divergence(model, held)
    rate = LEARNING_RATE * min(1.0, first / WIDE_APART)
    # Adam's steps have the size of its rate. Norms differ a hundredfold in theirs: SmolLM2's first layer has weights of 0.02.
    by_size = [{"params": [norm], "lr": rate * float(norm.detach().abs().mean())} for norm in norms]
    optimizer = torch.optim.Adam([{"params": grids}, *by_size], lr=rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 8) * (1 - step / steps))
    kept, order, generator = [part.detach().clone() for part in learning], [], torch.Generator().manual_seed(0)
    for step in range(steps):
        order = order or [train[i] for i in torch.randperm(len(train), generator=generator)]
        with torch.enable_grad():
            teacher.divergence(model, order.pop()).backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        show_progress("tuning steps", step + 1, steps)
        if (step + 1) % max(1, steps // CHECKS) == 0 and (reading := teacher.mean_divergence(model, held)) < best:
            best, kept = reading, [part.detach().clone() for part in learning]
    with torch.no_grad():
        for part, value in zip(learning, kept, strict=True):
            part.copy_(value)
    return first, best
