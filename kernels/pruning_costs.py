"""Which inputs of each layer's o_proj or down_proj matter, and what removing them costs the model, in nats per token.

Two looks at calibration text. First one backward pass gives the moments that kernels/refit.py ranks by. Its costs are local:
they take tokens as independent and the rest of the model as linear, and on SmolLM2's first layers they are wrong by a
factor of a hundred. So second, each layer's cost is measured: the layer alone is cut and refitted, the layers after it run,
and the KL divergence to the dense model is taken. Between the measured points the curve keeps the ranking's shape.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from devices import fast_products, require_float64
from kernels.calibration_cache import CalibrationCache, show_progress
from kernels.compensation import WRITERS
from kernels.divergence import Divergence, probe_windows
from kernels.refit import SELECTION_DAMPING, damped, eliminate

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


def moments(
    model, windows: torch.Tensor, layers: list, *, seed: int = 0, progress=None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
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
    generator = torch.Generator().manual_seed(seed)
    try:
        with torch.enable_grad():
            for done, window in enumerate(windows):
                embedded = model.get_input_embeddings()(window[None]).detach().requires_grad_(True)
                with fast_products(model.device):
                    logits = model(inputs_embeds=embedded, use_cache=False).logits[0].float()
                drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
                F.cross_entropy(logits, drawn.to(logits.device), reduction="sum").backward()
                if progress:
                    progress("gradients", done + 1, len(windows))
    finally:
        for handle in handles:
            handle.remove()
    tokens = windows.numel()
    return [(c / tokens, g / tokens) for c, g in zip(inputs, gradients, strict=True)]


def rank(
    model, windows: torch.Tensor, probes: torch.Tensor, layers: list, *,
    group: int, at_once: int, steps: int, points: list[int], progress=None,
) -> list[Ranking]:  # fmt: skip
    """The ranking of every layer of `layers` (one writer of each decoder layer, in order), costs measured at `points` steps.

    windows int64 [W, T] give the moments, probes int64 [P, T] the measured divergences; no weight is changed in the end.
    """
    require_float64(model.device)
    stats = moments(model, windows, layers, progress=progress)
    local = [eliminate(layer.weight, *pair, group=group, at_once=at_once, steps=steps)
        for layer, pair in zip(layers, stats, strict=True)]  # fmt: skip
    divergence = Divergence(model, probes)
    rankings = []
    for index, (layer, (order, costs)) in enumerate(zip(layers, local, strict=True)):
        dense, measured = layer.weight.data, {}
        for point in points:
            gone = Ranking(order, costs).removed(point)
            layer.weight.data = refitted_without(dense, stats[index][0], gone, group=group)
            measured[point] = divergence.after(index)
        layer.weight.data = dense
        rankings.append(Ranking(order, corrected(costs, measured)))
        if progress:
            progress("measuring", index + 1, len(layers))
    return rankings


def cached_rankings(model, windows: torch.Tensor, *, part: str, group: int, at_once: int, steps: int) -> list[Ranking]:
    """`rank` for the "attention" or "mlp" writers on a share of `windows` [W, T], with progress on stderr, kept on disk."""
    layers = [layer.get_submodule(WRITERS[part]) for layer in model.model.layers]
    probes = probe_windows(windows)
    points = sorted({max(1, round(share * steps)) for share in MEASURED_SHARES})
    options = {"part": part, "group": group, "at_once": at_once, "steps": steps, "points": points, "probes": list(probes.shape)}
    cache = CalibrationCache.of(model, windows, code=RANKING_CODE, **options)
    kept = cache.json("rankings")
    if kept is None:
        found = rank(model, moment_windows(windows), probes, layers, group=group, at_once=at_once, steps=steps, points=points,
            progress=show_progress)  # fmt: skip
        cache.save_json("rankings", kept := [asdict(ranking) for ranking in found])
    return [Ranking(**entry) for entry in kept]


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


def corrected(costs: list[float], measured: dict[int, float]) -> list[float]:
    """`costs` (after 1, 2, ... steps) scaled to pass through the `measured` ones, the factor moving geometrically between."""
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
