"""How many inputs each layer loses: one removal after another, each where the model as pruned so far feels it least.

Costs of layers do not add up. Each measured alone, 68 of SmolLM2's 270 heads should cost 0.049 nats; together and unfitted
they cost more, and other heads than the ones chosen so cost less. So the divergence from the dense model is measured again
after every removal. Not for every layer: a removal seldom gets cheaper by those before it, hence only the layer that was
cheapest when last looked at is looked at again, until the cheapest is fresh (lazy greedy, Minoux 1978): two measurements a
removal instead of thirty. The layers are refitted one by one meanwhile; compensation.py refits them in order afterwards.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable

import torch

from devices import require_float64
from fitting.calibration_cache import CalibrationCache, show_progress
from fitting.compensation import WRITERS, refit_in_order
from fitting.divergence import Divergence, probe_windows
from fitting.pruning_costs import RANKING_CODE, Ranking, cached_rankings, input_moments, refitted_without

PROBES = 8
MOVES = 72  # removals at most, each of as many steps as it takes


def remove_and_refit(
    model, windows: torch.Tensor, total: int, *, part: str, group: int, at_once: int, steps: int,
    cut: Callable[[int, list[int]], dict[str, torch.Tensor]],
) -> None:  # fmt: skip
    """Of all layers' "attention" or "mlp" writers, choose `total` steps of removals, cut them out and refit what is left.

    windows int64 [W, T] of calibration text; a step removes `at_once` groups of `group` inputs, a layer loses at most `steps`.
    `cut(index, removed)` takes the groups `removed` out of one layer and returns what compensation.refit_in_order asks for.
    """
    rankings = cached_rankings(model, windows, part=part, group=group, at_once=at_once, steps=steps)
    counts = cached_allocation(model, windows, rankings, total, part=part, group=group)
    removed = [ranking.removed(taken) for ranking, taken in zip(rankings, counts, strict=True)]
    cache = CalibrationCache.of(model, windows, part=part, removed=removed)
    refit_in_order(model, windows, cut=lambda index: cut(index, removed[index]), cache=cache)


def cached_allocation(model, windows: torch.Tensor, rankings: list[Ranking], total: int, *, part: str, group: int) -> list[int]:
    """How many steps of its ranking each layer takes, `total` together, for the "attention" or "mlp" writers.

    windows int64 [W, T] of calibration text; no weight is changed in the end. Every removal is kept on disk.
    ValueError if the rankings have fewer steps than `total`.
    """
    possible = sum(len(ranking.costs) for ranking in rankings)
    if total > possible:
        raise ValueError(f"{total} removals asked for, {possible} are possible")
    orders = [ranking.order for ranking in rankings]
    options = {"part": part, "group": group, "total": total, "orders": orders, "probes": PROBES, "moves": MOVES}
    cache = CalibrationCache.of(model, windows, code=(*RANKING_CODE, "allocation.py"), **options)
    taken = cache.json("taken") or [0] * len(rankings)
    if sum(taken) < total:
        _take_in_turn(model, windows, rankings, total, taken, cache, writers=WRITERS[part], group=group)
    return taken


@torch.no_grad()
def _take_in_turn(model, windows, rankings, total: int, taken: list[int], cache, *, writers: str, group: int) -> None:
    """Raises the entries of `taken` until they are `total` together."""
    require_float64(model.device)
    layers = [layer.get_submodule(writers) for layer in model.model.layers]
    dense = [layer.weight.data for layer in layers]
    moments = input_moments(model, windows, layers)
    divergence = Divergence(model, probe_windows(windows, PROBES))
    stride = math.ceil(total / MOVES)

    def without(index: int, steps: int) -> torch.Tensor:
        return refitted_without(dense[index], moments[index], rankings[index].removed(steps), group=group)

    def step_of(index: int) -> int:
        return min(stride, len(rankings[index].costs) - taken[index], total - sum(taken))

    def expected(index: int) -> float:
        costs = [0.0, *rankings[index].costs]
        return (costs[taken[index] + step_of(index)] - costs[taken[index]]) / step_of(index)

    try:
        for index, steps in enumerate(taken):  # what an earlier run had removed
            if steps:
                layers[index].weight.data = without(index, steps)
        divergence.follow()
        current, moves = divergence.after(0) if any(taken) else 0.0, 0
        queue = [(expected(index), -1, index) for index in range(len(layers)) if step_of(index)]
        heapq.heapify(queue)
        while sum(taken) < total:
            cost, measured_at, index = heapq.heappop(queue)
            steps, before = step_of(index), layers[index].weight.data
            layers[index].weight.data = without(index, taken[index] + steps)
            if measured_at != moves:
                now = divergence.after(index)
                layers[index].weight.data = before
                heapq.heappush(queue, ((now - current) / steps, moves, index))
                continue
            taken[index] += steps
            current, moves = current + cost * steps, moves + 1
            divergence.follow()
            cache.save_json("taken", taken)
            show_progress("removals", sum(taken), total)
            if step_of(index):
                heapq.heappush(queue, (max(cost, expected(index)), -1, index))
    finally:
        for layer, weight in zip(layers, dense, strict=True):
            layer.weight.data = weight
