"""Tuning of int4 grids: the right gradients, the same model before the first step, a smaller divergence after the last."""

from __future__ import annotations

import pytest
import torch
from conftest import logits_of, make_tiny
from torch import nn

from fitting import tuning
from fitting.blockwise import round_blockwise
from fitting.healing import Teacher
from fitting.tuning import TunableLinear, _GridProduct, on_grid, tune
from kernels.int4 import dequantize_int4, int4_linear_reference, quantize_int4

WINDOWS = torch.randint(1, 97, (24, 64), generator=torch.Generator().manual_seed(1))
GROUP = 32


def layer(n=20, k=80, seed=0):
    """A linear layer with a short last group of inputs, its nearest form, and the layer that may learn."""
    torch.manual_seed(seed)
    linear = nn.Linear(k, n)
    form = quantize_int4(linear.weight.data, GROUP)
    return linear, form, TunableLinear(linear, form, GROUP, torch.float32)


def test_before_the_first_step_it_is_the_int4_layer():
    linear, form, tunable = layer()
    x = torch.randn(3, 7, 80)
    assert torch.allclose(tunable(x), int4_linear_reference(x, *form, GROUP, linear.bias), atol=1e-5)
    assert torch.allclose(tunable.rows(torch.tensor([[3, 0]])), dequantize_int4(*form, GROUP)[[3, 0]], atol=1e-6)
    for now, before in zip(tunable.form(), form, strict=True):
        assert now.dtype == before.dtype and torch.equal(now, before)


def test_what_is_stored_is_what_was_learnt():
    _, _, tunable = layer()
    with torch.no_grad():
        tunable.scale.uniform_(-0.2, 0.2)
        tunable.center.uniform_(-0.2, 0.2)
        learnt = on_grid(tunable.levels, *tunable.grid(), GROUP)
        scale, center = tunable.step * (1 + tunable.scale), tunable.middle + tunable.step * tunable.center
    assert torch.allclose(learnt, on_grid(tunable.levels, scale, center, GROUP), atol=1e-3)  # but for bfloat16
    assert torch.allclose(learnt, dequantize_int4(*tunable.form(), GROUP), atol=1e-6)
    assert not torch.allclose(learnt, on_grid(tunable.levels, tunable.step, tunable.middle, GROUP), atol=1e-3)


def test_gradients_are_those_of_the_plain_product():
    _, _, tunable = layer()
    plain = [part.detach().clone().requires_grad_(True) for part in (torch.randn(9, 80), tunable.step, tunable.middle)]
    short = [part.detach().clone().requires_grad_(True) for part in plain]
    weights = torch.randn(9, 20)
    x, scale, center = plain
    ((x @ on_grid(tunable.levels, scale, center, GROUP).T) * weights).sum().backward()
    (_GridProduct.apply(short[0], tunable.levels, *short[1:], GROUP) * weights).sum().backward()
    for ours, expected in zip(short, plain, strict=True):
        assert torch.allclose(ours.grad, expected.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_the_divergence_falls_and_the_model_is_handed_back(tied, monkeypatch):
    """Judged on what it learns from: what a tiny random model gains on other windows lies within a processor's rounding."""
    monkeypatch.setattr(tuning, "held_out_and_trained", lambda windows, _: (list(range(windows)), list(range(windows))))
    model = make_tiny(tied=tied)
    forms = round_blockwise(model, WINDOWS[:8], group_size=GROUP, damping=0.01, tied=tied)
    del forms["model.layers.1.mlp.up_proj"]  # it gets int8
    modules, before = dict(model.named_modules()), {name: part.clone() for name, part in model.named_parameters()}
    monkeypatch.setattr(tuning, "LEARNING_RATE", 2 * tuning.LEARNING_RATE)
    tuned, norms = tune(model, WINDOWS, forms, group_size=GROUP, steps=30, tied=tied)
    assert dict(model.named_modules()) == modules and not any(part.requires_grad for part in model.parameters())
    assert all(torch.equal(before[name], part) for name, part in model.named_parameters())
    assert len(norms) == 7 and tuned.keys() == forms.keys()
    assert all(torch.equal(tuned[name][0], forms[name][0]) for name in forms)  # codes stand still

    def divergence(forms, norms):
        student = make_tiny(tied=tied)
        for name, form in forms.items():
            student.get_submodule(name).weight.data.copy_(dequantize_int4(*form, GROUP))
        for name, weight in norms.items():
            student.get_parameter(name).data.copy_(weight)
        exact = logits_of(model, WINDOWS).log_softmax(-1)
        return (exact.exp() * (exact - logits_of(student, WINDOWS).log_softmax(-1))).sum(-1).mean()

    assert divergence(tuned, norms) < 0.9 * divergence(forms, {})


def test_one_window_is_refused():
    with pytest.raises(ValueError, match="two"):
        Teacher(make_tiny(), WINDOWS[:1])


def test_a_model_with_less_to_gain_learns_slower(monkeypatch):
    """In proportion to how far it is from the float model, and never faster than at the full rate."""
    model = make_tiny()
    forms = round_blockwise(model, WINDOWS[:4], group_size=GROUP, damping=0.01, tied=False)
    rates, adam = [], torch.optim.Adam

    def watched(groups, lr, **options):
        rates.append(lr)
        return adam(groups, lr=lr, **options)

    monkeypatch.setattr(torch.optim, "Adam", watched)
    for apart in (9.0, tuning.WIDE_APART / 3):
        monkeypatch.setattr(Teacher, "mean_divergence", lambda *_, apart=apart: apart)
        tune(model, WINDOWS[:4], forms, group_size=GROUP, steps=1, tied=False)
    assert rates == pytest.approx([tuning.LEARNING_RATE, tuning.LEARNING_RATE / 3])
