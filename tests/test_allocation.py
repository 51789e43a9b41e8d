"""Heads are taken where the model as pruned so far feels it least: known costs, every removal kept, weights given back."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import make_tiny

import models
from fitting import allocation, calibration_cache
from fitting.allocation import cached_allocation
from fitting.pruning_costs import Ranking

HEADS, WIDTH = 9, 16
WINDOWS = torch.randint(1, 97, (2, 64), generator=torch.Generator().manual_seed(1))
ORDER = [[head] for head in range(HEADS - 1)]


class KnownCosts:
    """Stands for Divergence: the square of what a layer lost, and ten nats for each head that its neighbour lost as well."""

    def __init__(self, model, _probes):
        self.model, self.readings = model, 0

    def follow(self) -> None:
        pass

    def after(self, _index: int) -> float:
        self.readings += 1
        lost = [int((layer.self_attn.o_proj.weight.unflatten(1, (-1, WIDTH)).abs().sum((0, 2)) == 0).sum())
            for layer in self.model.model.layers]  # fmt: skip
        return sum(count * count for count in lost) + 10.0 * sum(map(min, itertools.pairwise(lost)))


@pytest.fixture
def model(monkeypatch, tmp_path):
    monkeypatch.setattr(calibration_cache, "ROOT", tmp_path)
    model = make_tiny("three_a_group")
    model.source = models.ModelSource("tiny", "random", "")
    return model


def rankings(*costs: float) -> list[Ranking]:
    """Layers whose first head should cost so much, measured alone, and later ones more."""
    return [Ranking(ORDER, [cost * (steps + 1) ** 2 for steps in range(HEADS - 1)]) for cost in costs]


def take(model, total: int, *costs: float) -> list[int]:
    return cached_allocation(model, WINDOWS, rankings(*costs), total, part="attention", group=WIDTH)


def test_it_sees_what_layers_measured_alone_do_not(model, monkeypatch):
    """By their own costs each layer would lose two; together the middle one is dear, however cheap it was said to be."""
    monkeypatch.setattr(allocation, "Divergence", KnownCosts)
    dense = [layer.self_attn.o_proj.weight.clone() for layer in model.model.layers]
    assert take(model, 6, 1.0, 1.0, 1.0) == [3, 0, 3]
    assert take(model, 7, 0.5, 0.6, 0.4) in ([4, 0, 3], [3, 0, 4])
    for layer, weight in zip(model.model.layers, dense, strict=True):
        assert torch.equal(layer.self_attn.o_proj.weight, weight)


def test_few_readings_a_removal(model, monkeypatch):
    made = []
    monkeypatch.setattr(allocation, "Divergence", lambda *args: made.append(KnownCosts(*args)) or made[-1])
    assert sum(take(model, 8, 1.0, 1.0, 1.0)) == 8
    assert made[0].readings <= 2 * 8 + 3


def test_every_removal_is_kept(model, monkeypatch):
    """Cut short, the next run goes on from the last removal and ends where an uninterrupted one does."""
    monkeypatch.setattr(allocation, "Divergence", KnownCosts)
    expected = take(model, 7, 1.0, 2.0, 3.0)
    (kept,) = calibration_cache.ROOT.glob("*/taken.json")
    assert kept.read_text() == str(expected)
    kept.write_text("[3, 0, 0]")
    assert take(model, 7, 1.0, 2.0, 3.0) == expected
    monkeypatch.setattr(allocation, "Divergence", None)  # nothing is measured twice
    assert take(model, 7, 1.0, 2.0, 3.0) == expected


def test_no_layer_loses_more_than_its_ranking_holds(model, monkeypatch):
    monkeypatch.setattr(allocation, "Divergence", KnownCosts)
    assert take(model, 3 * (HEADS - 1), 1.0, 1.0, 1.0) == [HEADS - 1] * 3


def test_many_steps_are_taken_several_at_a_time(model, monkeypatch):
    monkeypatch.setattr(allocation, "Divergence", KnownCosts)
    monkeypatch.setattr(allocation, "MOVES", 4)
    taken = take(model, 10, 1.0, 2.0, 1.5)
    assert sum(taken) == 10 and max(taken) <= HEADS - 1


def test_beyond_what_is_there(model):
    with pytest.raises(ValueError, match=r"25 removals.*24 are possible"):
        take(model, 3 * (HEADS - 1) + 1, 1.0, 1.0, 1.0)
