"""The divergence that pruning chooses by: equal to the whole vocabulary's where all of it is asked, near it where a few are."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
import torch.nn.functional as F
from conftest import make_tiny

from fitting import divergence, healing
from fitting.divergence import Divergence, asked_tokens, divergence_of, probe_windows
from optimizations import quantization

PROBES = torch.randint(1, 97, (3, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model(monkeypatch, tmp_path):
    """With a calibration cache of the test's own: a teacher would find the answers that another number of tokens gave."""
    monkeypatch.setattr("fitting.calibration_cache.ROOT", tmp_path)
    return make_tiny("three_a_group")


@torch.no_grad()
def whole_divergence(model, before: torch.Tensor) -> float:
    """In nats per token, over the whole vocabulary, the model run from its first layer."""
    after = model(PROBES).logits.log_softmax(-1)
    return float(F.kl_div(after, before, log_target=True, reduction="sum")) / PROBES.numel()


@pytest.mark.parametrize(("asked", "tolerance"), [(98, 1e-4), (32, 0.15)])
@pytest.mark.parametrize("sharpness", [1, 4])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_it_is_the_divergence_of_the_answers(model, monkeypatch, index, sharpness, asked, tolerance):
    """Of a model that knows nothing or something; the first change alone, and one more after it."""
    monkeypatch.setattr(divergence, "fast_products", lambda _device: contextlib.nullcontext())
    monkeypatch.setattr(divergence, "LIKELIEST", asked // 2)
    monkeypatch.setattr(divergence, "DRAWN", asked // 2)
    model.lm_head.weight.data *= sharpness
    with torch.no_grad():
        before = model(PROBES).logits.log_softmax(-1)
    reading = Divergence(model, PROBES)
    assert reading.after(index) == pytest.approx(0, abs=1e-9)
    model.model.layers[index].self_attn.o_proj.weight.data[:, :32] = 0
    assert reading.after(index) == pytest.approx(whole_divergence(model, before), rel=tolerance)
    reading.follow()
    model.model.layers[2].mlp.down_proj.weight.data[:, ::2] = 0
    assert reading.after(2) == pytest.approx(whole_divergence(model, before), rel=tolerance)


def test_shares_are_a_distribution_and_the_likeliest_are_asked():
    logits = 3 * torch.randn(5, 1000, generator=torch.Generator().manual_seed(2))
    tokens, shares = asked_tokens(logits, torch.Generator().manual_seed(0), likeliest=8, drawn=8)
    assert tokens.shape == shares.shape == (5, 16)
    torch.testing.assert_close(shares.sum(-1), torch.ones(5))
    chances, likeliest = logits.softmax(-1).topk(8)
    torch.testing.assert_close(shares[:, :8], chances)
    assert torch.equal(tokens[:, :8], likeliest)
    assert all(set(drawn.tolist()).isdisjoint(first.tolist()) for drawn, first in zip(tokens[:, 8:], likeliest, strict=True))


def test_a_model_without_doubt():
    """Of one token everything, of the others nothing at all that float32 could hold."""
    logits = 1000 * torch.eye(3, 500)
    tokens, shares = asked_tokens(logits, torch.Generator().manual_seed(0), likeliest=8, drawn=8)
    moved = torch.full(tokens.shape, -500.0)
    moved[:, 0] = 0
    assert float(divergence_of(moved, shares)) == 0
    assert float(divergence_of(-moved, shares)) == pytest.approx(0, abs=1e-12)


def test_small_divergences_do_not_drown_in_rounding():
    """A thousandth of a nat's millionth, from logits of a common size: p (d - mean)^2 / 2 to second order."""
    shares = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    moved = torch.tensor([[3e-5, 0.0, -2e-5]]) + 4.0
    exact = moved.double()
    variance = float((shares * exact**2).sum() - (shares * exact).sum() ** 2)
    assert float(divergence_of(moved, shares)) == pytest.approx(variance / 2, rel=1e-3)


def test_others_are_drawn_as_often_as_they_are_likely():
    """4000 draws beyond the first two of five tokens against their probabilities."""
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0, -1.0] + [-30.0] * 5000])
    tokens, shares = asked_tokens(logits, torch.Generator().manual_seed(0), likeliest=2, drawn=4000)
    rest = logits[0].softmax(-1)[2:]
    drawn = torch.bincount(tokens[0, 2:], minlength=5005)[2:] / 4000
    assert (drawn - rest / rest.sum()).abs().sum() / 2 < 0.05
    torch.testing.assert_close(shares[0, 2:].sum(), rest.sum())


def test_probes_are_beginnings_of_the_first_windows(monkeypatch):
    monkeypatch.setattr(divergence, "PROBE_LENGTH", 3)
    assert probe_windows(torch.arange(60).view(12, 5), 2).tolist() == [[0, 1, 2], [5, 6, 7]]


def test_a_quantised_output_layer_is_refused(model):
    with pytest.raises(ValueError, match="prune before"):
        Divergence(quantization.apply(model, scheme="weight-only"), PROBES)


@pytest.mark.parametrize("trained_head", [False, True])
def test_a_model_is_no_distance_from_its_own_teacher(model, monkeypatch, trained_head):
    """Where layers run in bfloat16 as well: the two sides round alike."""
    bf16 = functools.partial(torch.autocast, "cpu", torch.bfloat16)
    monkeypatch.setattr(healing, "fast_products", lambda _device: bf16())
    monkeypatch.setattr(healing, "KEPT_TOKENS", 8)
    model.lm_head.weight.data *= 10  # logits of a common size
    teacher = healing.Teacher(model, PROBES)
    if trained_head:
        model.lm_head = torch.nn.Sequential(model.lm_head)
    with torch.no_grad():
        assert max(float(teacher.divergence(model, index)) for index in range(len(PROBES))) < 1e-3


@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize(("kept", "drawn", "tolerance"), [(97, 1, 1e-3), (24, 16, 0.15)])
def test_the_teachers_divergence_is_the_same(model, monkeypatch, trained_head, kept, drawn, tolerance):
    """Of a plain lm_head a few tokens are asked; one that is not plain gives its whole answer. Both have a gradient."""
    monkeypatch.setattr(healing, "fast_products", lambda _device: contextlib.nullcontext())
    monkeypatch.setattr(healing, "KEPT_TOKENS", kept)
    monkeypatch.setattr(healing, "DRAWN_TOKENS", drawn)
    model.lm_head.weight.data *= 4
    teacher = healing.Teacher(model, PROBES)
    with torch.no_grad():
        before = model(PROBES).logits.log_softmax(-1)
    changed = model.model.layers[1].mlp.down_proj.weight
    changed.data[:, ::2] = 0
    if trained_head:
        model.lm_head = torch.nn.Sequential(model.lm_head)
    changed.requires_grad_(True)
    readings = [teacher.divergence(model, index) for index in range(len(PROBES))]
    assert sum(float(reading.detach()) for reading in readings) / 3 == pytest.approx(
        whole_divergence(model, before), rel=tolerance
    )
    readings[0].backward()
    assert changed.grad.abs().sum() > 0
