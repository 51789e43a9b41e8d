"""The closed forms against slow direct ones: least squares on the raw activations, costs by refitting every candidate."""

import math

import pytest
import torch

from fitting.pruning_costs import refitted_without, scaled_to_measured
from fitting.refit import SELECTION_DAMPING, Regression, damped, eliminate, fit_ridge, ridge


def activations(tokens=400, width=24, seed=0):
    """Correlated inputs [T, K] and a weight [N, K]: without correlation a refit has nothing to find."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator)
    return torch.randn(tokens, width, generator=generator) @ mixing, torch.randn(10, width, generator=generator)


def direct(x, y, kept, damping, start):
    """min |y - x_kept w^T|^2 + damping * mean diag * |w - start|^2 by lstsq on stacked rows, in float64."""
    a, goal, start = x[:, kept].double(), y.double(), start.double()
    strength = (damping * (a.T @ a).diagonal().mean()).sqrt()
    rows = torch.cat([a, strength * torch.eye(len(kept), dtype=a.dtype)])
    return torch.linalg.lstsq(rows, torch.cat([goal, strength * start.T])).solution.T


@pytest.mark.parametrize("damping", [1e-3, 0.1, 1.0])
def test_ridge_equals_least_squares_on_raw_activations(damping):
    x, w = activations()
    kept = [column for column in range(24) if column not in (3, 4, 17)]
    y, moments = x @ w.T, Regression()
    for rows in x.split(64):
        moments.add(rows[:, kept], rows @ w.T)
    expected = direct(x, y, kept, damping, w[:, kept])
    torch.testing.assert_close(ridge(moments, w[:, kept], damping), expected, atol=1e-4, rtol=1e-4)
    error = float((y.double() - x[:, kept].double() @ expected.T).square().sum(1).mean())
    assert moments.error(expected) == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("group", "at_once"), [(4, 1), (1, 1), (1, 3)])
def test_elimination_costs_equal_refitting_what_is_left(group, at_once, weighted):
    """After every step: the cost from the running inverse is the error of the best weights on the columns that stay."""
    x, w = activations()
    c = (x.T @ x / len(x)).float()
    root = torch.randn(10, 10, generator=torch.Generator().manual_seed(1))
    g = root @ root.T if weighted else None
    order, costs = eliminate(w, c, g, group=group, at_once=at_once, steps=4)
    full, gone = damped(c, SELECTION_DAMPING), []
    for step, cost in zip(order, costs, strict=True):
        gone += [column for one in step for column in range(one * group, one * group + group)]
        kept = [column for column in range(24) if column not in gone]
        best = torch.zeros(10, 24, dtype=torch.float64)
        best[:, kept] = torch.linalg.solve(full[kept][:, kept], full[kept] @ w.double().T).T
        difference = best - w.double()
        felt = difference if g is None else g.double() @ difference
        assert cost == pytest.approx(float(((felt @ full) * difference).sum()) / 2, rel=1e-6)
        groups = sorted(one for batch in order[: order.index(step) + 1] for one in batch)
        torch.testing.assert_close(refitted_without(w, c, groups, group=group).double(), best, atol=1e-5, rtol=1e-5)


def test_the_cheapest_group_goes_first():
    """A group that copies another costs nothing to remove; by the norm of its weights it would be the dearest."""
    x, w = activations()
    x[:, 8:12] = x[:, 0:4]
    w[:, 8:12] *= 100
    order, _ = eliminate(w, x.T @ x / len(x), group=4, at_once=1, steps=1)
    assert order[0] in ([0], [2])


def test_damping_is_chosen_on_held_out_tokens():
    """With few noisy training tokens much damping is right; a fit that helps nowhere gives the start back."""
    x, w = activations(tokens=2000)
    train, held_out = Regression(), Regression()
    noise = 5 * torch.randn(2000, 10, generator=torch.Generator().manual_seed(2))
    train.add(x[:30], x[:30] @ w.T + noise[:30])
    held_out.add(x[30:], x[30:] @ w.T + noise[30:])
    weight = fit_ridge(train, held_out, w)
    assert held_out.error(weight) <= held_out.error(w)
    assert any(torch.equal(weight, kept) for kept in (w, *(ridge(train, w, damping).float() for damping in (1.0, 0.1))))
    start = torch.linalg.lstsq(x[:30], x[:30] @ w.T + noise[:30]).solution.T
    assert torch.equal(fit_ridge(held_out, train, start), start) and start.dtype == torch.float32


def test_measured_costs_are_met_and_the_shape_kept_between():
    costs = [1.0, 2.0, 4.0, 8.0, 16.0]
    assert scaled_to_measured(costs, {2: 4.0, 4: 64.0})[1] == pytest.approx(4.0)
    assert scaled_to_measured(costs, {2: 4.0, 4: 64.0})[3] == pytest.approx(64.0)
    assert scaled_to_measured(costs, {2: 4.0, 4: 64.0})[2] == pytest.approx(4 * 2 * math.sqrt(4))  # halfway from 2x to 8x
    assert scaled_to_measured(costs, {2: 4.0, 4: 64.0})[4] == pytest.approx(128.0)
    assert scaled_to_measured(costs, {3: 4.0}) == pytest.approx(costs)
    falling = scaled_to_measured(costs, {2: 4.0, 4: 0.1})
    assert falling == sorted(falling)
