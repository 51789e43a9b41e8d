"""Short recovery: the pruned model learns the dense model's answers on calibration text, for a few minutes.

The dense model's most likely tokens and a few of the others are kept, on disk too, before it is pruned: no second model is
held, and who finds a result on disk does not run it. Low-rank updates (LoRA, Hu et al. 2021,
https://arxiv.org/abs/2106.09685; for pruned models: Ma et al. 2023, LLM-Pruner) of every projection are trained with AdamW on
the KL divergence and then added into the weights: shapes, bytes and speed stay what pruning made them. Where the device
multiplies bfloat16 in hardware, products run in it, on copies of the frozen weights: twice the steps in the same time. A few
calibration windows are never trained on; the updates that did best there are the ones kept.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from torch import nn

from devices import fast_products, has_half_arithmetic
from fitting.calibration_cache import CalibrationCache, show_progress
from fitting.divergence import asked_logits, asked_tokens, divergence_of

KEPT_TOKENS = 128  # of the dense distribution at each position
DRAWN_TOKENS = 32  # of the others, which they stand for
HELD_OUT_EVERY = 8
HELD_OUT_MOST = 8
RANK = 4  # a step sees one window: more numbers would learn its noise
LEARNING_RATE = 1.5e-3
CHECKS = 6  # held-out readings spread over the time given
PATIENCE = 2  # readings in a row without gain that end the training


def check(minutes: float) -> None:
    """Raises ValueError for a time that is no time."""
    if not 0 <= minutes <= 600:
        raise ValueError(f"--heal-minutes {minutes:g}: choose a number of minutes from 0 (no training) to 600")


def add_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--heal-minutes", type=float, default=0.0, metavar="M",
        help="then train towards the dense model's answers for so long; measured untrained as well (default: 0)")  # fmt: skip


def recipes(technique: str, options: dict) -> dict[str, list[tuple[str, dict]]]:
    """The model as `technique` prunes it and, where training is asked for, trained: what recovery gains is seen apart."""
    pruned = {technique: [(technique, options | {"heal_minutes": 0.0})]}
    return pruned | ({f"{technique}_healed": [(technique, options)]} if options["heal_minutes"] else {})


class Teacher:
    """The dense model's answers on `windows` int64 [W, T]: the likeliest tokens at each position and a few of the others, with
    their log-probabilities and their shares of the distribution (fitting/divergence.py), [W, T, asked] each."""

    @torch.inference_mode()
    def __init__(self, model, windows: torch.Tensor):
        if len(windows) < 2:
            raise ValueError("the calibration text fills one window; training needs two")
        cache = CalibrationCache.of(model, windows, code=("divergence.py", "healing.py"))
        kept = cache.tensors("answers", model.device)
        if kept is None:
            kept = self._ask(model, windows)
            cache.save_tensors("answers", kept)
        self.windows, self._answers = windows.clone(), list(zip(kept["tokens"], kept["logs"], kept["shares"], strict=True))

    @staticmethod
    def _ask(model, windows: torch.Tensor) -> dict[str, torch.Tensor]:
        answers, generator = [], torch.Generator().manual_seed(0)
        for done, window in enumerate(windows):
            with fast_products(model.device):
                hidden = model.model(window[None], use_cache=False).last_hidden_state[0]
            logits = model.lm_head(hidden.float())  # in float32: rounded ones alone would be 0.001 nats
            tokens, shares = asked_tokens(logits, generator, likeliest=KEPT_TOKENS, drawn=DRAWN_TOKENS)
            answers.append((tokens.to(torch.int32), logits.log_softmax(-1).gather(1, tokens), shares))
            show_progress("dense answers", done + 1, len(windows))
        tokens, logs, shares = (torch.stack(part) for part in zip(*answers, strict=True))
        return {"tokens": tokens, "logs": logs, "shares": shares}

    def divergence(self, model, index: int) -> torch.Tensor:
        """KL(dense || model) on one window, nats per token, differentiable.

        A plain lm_head answers for the tokens asked about only, which saves SmolLM2 a third of a training step. Where lm_head
        itself is trained, or rounds its inputs, its whole answer is taken: the likeliest tokens one by one, all others as one
        outcome, so that every row of it gets a gradient.
        """
        with torch.inference_mode(False):
            window, tokens, dense, shares = (part.clone() for part in (self.windows[index], *self._answers[index]))
        tokens = tokens.long()
        with fast_products(model.device):
            hidden = model.model(window[None], use_cache=False).last_hidden_state[0]
            logits = None if type(model.lm_head) is nn.Linear else model.lm_head(hidden).float()
        if logits is None:
            return divergence_of(asked_logits(model.lm_head, hidden, tokens) - dense, shares) / len(window)
        tokens, dense = tokens[:, :KEPT_TOKENS], dense[:, :KEPT_TOKENS]
        inside = logits.gather(1, tokens) - logits.logsumexp(-1, keepdim=True)
        dense_rest, rest = (1 - side.exp().sum(1).clamp_max(1 - 1e-6) for side in (dense, inside))
        return ((dense.exp() * (dense - inside)).sum(1) + dense_rest * (dense_rest / rest).log()).mean()

    @torch.no_grad()
    def mean_divergence(self, model, held: range) -> float:
        """Of the windows `held`, nats per token."""
        return sum(float(self.divergence(model, index)) for index in held) / len(held)


def held_out_and_trained(count: int, most: int) -> tuple[range, range]:
    """Of `count` windows those never trained on, the first, which are of all kinds of text (calibration.py), and the others."""
    held = min(most, -(-count // HELD_OUT_EVERY))
    return range(held), range(held, count)


class LowRank(nn.Module):
    """A frozen linear layer plus B A x; B starts at zero, so that nothing changes before the first step."""

    def __init__(self, linear: nn.Linear, generator: torch.Generator):
        super().__init__()
        self.linear = linear
        half = has_half_arithmetic(linear.weight.device, torch.bfloat16)[0]
        self.frozen = linear.weight.detach().bfloat16() if half else linear.weight.detach()
        rank = min(RANK, *linear.weight.shape)
        down = torch.randn(rank, linear.in_features, generator=generator) * linear.in_features**-0.5
        self.a = nn.Parameter(down.to(linear.weight.device))
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank, device=linear.weight.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.frozen, self.linear.bias) + F.linear(F.linear(x, self.a), self.b)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        weight = self.linear.weight + self.b @ self.a
        self.linear.weight = nn.Parameter(weight, requires_grad=False)
        return self.linear


def heal(model, teacher: Teacher, *, minutes: float) -> str:
    """Train for at most `minutes`, in place; returns the sentence for the model's notes.

    The order of windows and the start are always the same; how many steps fit is the machine's. What was learnt is kept on
    disk, and taken from there for the same pruned weights, windows and minutes.
    """
    cache = CalibrationCache.of(model, teacher.windows, code=("divergence.py", "healing.py"), minutes=minutes)
    generator = torch.Generator().manual_seed(0)
    names = [name for name, part in model.model.layers.named_modules() if type(part) is nn.Linear]
    for name in names:
        model.model.layers.set_submodule(name, LowRank(model.model.layers.get_submodule(name), generator))
    updates = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    learnt, note = cache.tensors("healed", model.device), cache.json("healed")
    if learnt is None or note is None:
        learnt, note = _train(model, teacher, updates, minutes=minutes, generator=generator)
        cache.save_tensors("healed", learnt)
        cache.save_json("healed", note)
    with torch.no_grad():
        for name, update in updates.items():
            update.copy_(learnt[name])
    for name in names:
        model.model.layers.set_submodule(name, model.model.layers.get_submodule(name).merged())
    return note


def _train(model, teacher: Teacher, updates: dict, *, minutes: float, generator) -> tuple[dict[str, torch.Tensor], str]:
    """The `updates` that did best on held-out windows, by name, and what is to be said of them."""
    held, train = held_out_and_trained(len(teacher.windows), HELD_OUT_MOST)
    optimizer = torch.optim.AdamW(updates.values(), lr=LEARNING_RATE, weight_decay=0.0)
    first = best = teacher.mean_divergence(model, held)
    kept = {name: update.detach().clone() for name, update in updates.items()}
    start, steps, checks, shown, stale, order = time.monotonic(), 0, 0, 0, 0, []
    while (used := (time.monotonic() - start) / (60 * minutes)) < 1 and stale < PATIENCE:
        order = order or [train[i] for i in torch.randperm(len(train), generator=generator)]
        for group in optimizer.param_groups:  # up over the first steps, then down to nothing when the time ends
            group["lr"] = LEARNING_RATE * min(1.0, (steps + 1) / 10) * (1 - used)
        with torch.enable_grad():
            teacher.divergence(model, order.pop()).backward()
        nn.utils.clip_grad_norm_(updates.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        used = (time.monotonic() - start) / (60 * minutes)
        if used * 10 >= shown + 1:
            shown = min(10, int(used * 10))
            show_progress("healing, tenths of the time", shown, 10)
        if used * CHECKS >= checks + 1:
            checks = int(used * CHECKS)
            reading = teacher.mean_divergence(model, held)
            stale = 0 if reading < best else stale + 1
            if reading < best:
                best, kept = reading, {name: update.detach().clone() for name, update in updates.items()}
    spent = (time.monotonic() - start) / 60
    apart = f"{first:.4f} -> {best:.4f} nats per token"
    note = f"healed in {steps} steps, {spent:.1f} minutes: KL to the model before pruning on held-out text about {apart}"
    return kept, note
