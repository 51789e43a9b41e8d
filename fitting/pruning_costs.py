"""Which inputs of each layer's o_proj or down_proj matter, and what removing them costs the model, in nats per token.

Two looks at calibration text. First one backward pass gives the moments that fitting/refit.py ranks by. Its costs are local:
they take tokens as independent and the rest of the model as linear, and on SmolLM2's first layers they are wrong by a
factor of a hundred. So second, each layer's cost is measured: the layer alone is cut and refitted, the layers after it run,
and the KL divergence to the dense model is taken. Between the measured points the curve keeps the ranking's shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from devices import fast_products, require_float64
from fitting import calibration
from fitting.calibration_cache import CalibrationCache, show_progress
from fitting.compensation import WRITERS
from fitting.divergence import Divergence, probe_windows
from fitting.refit import SELECTION_DAMPING, damped, eliminate

MOMENT_WINDOWS = 24
RANKING_CODE = ("refit.py", "divergence.py", "pruning_costs.py")  # what the results depend on
MEASURED_SHARES = (0.25, 0.5)  # of the steps: where removals of 10 to 40 % of the whole model land
SMALLEST_COST = 1e-7  # nats; below it lies rounding, and ratios of costs mean nothing


@dataclass(frozen=True)
class Ranking:
    """Of one layer: `order[k]` are the input groups that step k removes, `costs[k]` nats per token after it."""

    order: list[list[int]]
    costs: list[float]

    def removed(self, steps: int) -> list[int]:
        """All groups gone after `steps` steps, ascending."""
        return sorted(group for step in self.order[:steps] for group in step)


def moments(model, windows: torch.Tensor, layers: list) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """C [K, K] of each layer's inputs and G [N, N] of the gradients at its outputs, float32; windows int64 [W, T].

    Gradients are of the log-likelihood of tokens drawn from the model's own distribution, so that G is the Fisher information.
    """
    inputs, gradients = [0.0] * len(layers), [0.0] * len(layers)

    def watch(index: int):
        def hook(_module, arguments, output):
            x = arguments[0].detach().reshape(-1, arguments[0].shape[-1]).float()
            with torch.autocast(x.device.type, enabled=False):  # moments are inverted: bfloat16 would make them indefinite
                inputs[index] = inputs[index] + x.T @ x
            output.register_hook(lambda gradient: collect(index, gradient))

        return hook

    def collect(index: int, gradient: torch.Tensor) -> None:
        g = gradient.reshape(-1, gradient.shape[-1]).float()
        gradients[index] = gradients[index] + g.T @ g

    handles = [layer.register_forward_hook(watch(index)) for index, layer in enumerate(layers)]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.enable_grad():
            for done, window in enumerate(windows):
                embedded = model.get_input_embeddings()(window[None]).detach().requires_grad_(True)
                with fast_products(model.device):
                    logits = model(inputs_embeds=embedded, use_cache=False).logits[0].float()
                drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
                F.cross_entropy(logits, drawn.to(logits.device), reduction="sum").backward()
                show_progress("gradients", done + 1, len(windows))
    finally:
        for handle in handles:
            handle.remove()
    tokens = windows.numel()
    return [(c / tokens, g / tokens) for c, g in zip(inputs, gradients, strict=True)]


def cached_rankings(model, windows: torch.Tensor, *, part: str, group: int, at_once: int, steps: int) -> list[Ranking]:
    """The ranking of every decoder layer's "attention" or "mlp" writer, costs measured at a few numbers of steps.

    The first of `windows` int64 [W, T] give the moments and the measured divergences; no weight is changed in the end. The
    local costs of all layers, and then what each layer measures, are kept on disk: an interrupted run goes on from there.
    """
    layers = [layer.get_submodule(WRITERS[part]) for layer in model.model.layers]
    probes = probe_windows(windows)
    points = sorted({max(1, round(share * steps)) for share in MEASURED_SHARES})
    options = {"part": part, "group": group, "at_once": at_once, "steps": steps, "points": points, "probes": list(probes.shape)}
    cache = CalibrationCache.of(model, windows, code=RANKING_CODE, **options)
    local, measured, inputs = cache.json("local"), cache.json("measured") or [], None
    if local is None:
        require_float64(model.device)
        stats = moments(model, moment_windows(windows), layers)
        local = [eliminate(layer.weight, *pair, group=group, at_once=at_once, steps=steps)
            for layer, pair in zip(layers, stats, strict=True)]  # fmt: skip
        cache.save_json("local", local)
        inputs = [second_moment for second_moment, _ in stats]
    if len(measured) < len(layers):
        inputs = inputs or input_moments(model, windows, layers)
        divergence = Divergence(model, probes)
    for index in range(len(measured), len(layers)):
        rankings = [Ranking(*local[index]).removed(point) for point in points]
        measured.append(_divergences_without(layers[index], inputs[index], rankings, divergence, index, group=group))
        cache.save_json("measured", measured)
        show_progress("measuring", index + 1, len(layers))
    return [
        Ranking(order, scaled_to_measured(costs, dict(zip(points, readings, strict=True))))
        for (order, costs), readings in zip(local, measured, strict=True)
    ]


def _divergences_without(layer, second_moment, removals: list[list[int]], divergence, index: int, *, group: int) -> list[float]:
    """Nats per token that the model loses with each of `removals` gone from `layer` of decoder layer `index`, refitted."""
    dense, readings = layer.weight.data, []
    try:
        for gone in removals:
            layer.weight.data = refitted_without(dense, second_moment, gone, group=group)
            readings.append(divergence.after(index))
    finally:
        layer.weight.data = dense
    return readings


def input_moments(model, windows: torch.Tensor, layers: list) -> list[torch.Tensor]:
    """C [K, K] of each layer's inputs on the windows that moments are taken on, as `moments` gives it, without gradients."""

    def run() -> None:
        for window in moment_windows(windows):
            with fast_products(model.device):
                model.model(window[None], use_cache=False)

    return calibration.second_moments(run, layers)


def moment_windows(windows: torch.Tensor) -> torch.Tensor:
    """Those of `windows` [W, T] that moments are taken on: the first, which are of all kinds of text (calibration.py)."""
    return windows[:MOMENT_WINDOWS]


def refitted_without(weight: torch.Tensor, second_moment: torch.Tensor, gone: list[int], *, group: int) -> torch.Tensor:
    """`weight` [N, K] with the columns of the groups in `gone` zero and the others refitted, in one closed form."""
    columns = torch.ones(weight.shape[1] // group, group, dtype=torch.bool, device=weight.device)
    columns[gone] = False
    kept = columns.flatten().nonzero()[:, 0]
    c = damped(second_moment, SELECTION_DAMPING)
    result = torch.zeros_like(weight)
    result[:, kept] = torch.linalg.solve(c[kept][:, kept], c[kept] @ weight.double().T).T.to(weight.dtype)
    return result


def scaled_to_measured(costs: list[float], measured: dict[int, float]) -> list[float]:
    """`costs` (after 1, 2, ... steps) scaled to pass through the `measured` ones; the log of the factor is linear between."""
    points = sorted(measured)
    factors = [math.log(max(measured[p], SMALLEST_COST) / max(costs[p - 1], SMALLEST_COST)) for p in points]
    result: list[float] = []
    for steps, cost in enumerate(costs, start=1):
        after = next((i for i, point in enumerate(points) if point >= steps), len(points) - 1)
        before = max(after - 1, 0) if points[after] >= steps else after
        span = points[after] - points[before]
        share = min(max((steps - points[before]) / span, 0.0), 1.0) if span else 0.0
        factor = factors[before] + share * (factors[after] - factors[before])
        result.append(max([cost * math.exp(factor), *result[-1:]]))  # removing more never costs less
    return result
