"""Outlier migration changes nothing in exact arithmetic, and helps int8 with one scale per token."""

from __future__ import annotations

import pytest
import torch
from conftest import logits_of, make_tiny

import cli
from fitting.smoothing import fold, input_absmax, migrate, seams, smoothing_factors
from models import ModelSource
from optimizations import head_pruning, quantization, smoothing

QUICK = {"calibration_tokens": 512}


def random_tiny(*args, **kwargs):
    model = make_tiny(*args, max_position_embeddings=512, **kwargs)
    model.source = ModelSource("tiny", "random", "")
    return model


def with_outliers(model):
    """Two channels of every norm, of every v_proj and up_proj a hundred times larger, and read a hundred times smaller."""
    for seam in seams(model):
        factors = torch.ones(seam.source.weight.shape[0])
        factors[[1, 5]] = 0.01
        fold(seam, factors)
    return model


def test_outliers_are_looked_for_once(monkeypatch):
    """What a second load finds on disk gives the same weights, and no text is run again."""
    first = smoothing.apply(random_tiny(), **QUICK)
    monkeypatch.setattr("fitting.smoothing.input_absmax", None)
    second = smoothing.apply(random_tiny(), **QUICK)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shape", ["grouped", "three_a_group", "multi_head"])
@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_logits_stay_what_they_were(shape, tied, strength, ids):
    reference = random_tiny(shape, tied=tied)
    model = smoothing.apply(random_tiny(shape, tied=tied), strength=strength, **QUICK)
    expected = logits_of(reference, ids)
    assert (logits_of(model, ids) - expected).abs().max() < 1e-4 * expected.abs().max()
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, reference.get_parameter(name))]
    assert ("model.norm.weight" in changed) is not tied and len(changed) == 3 * 9 + 2 * (not tied)
    assert ("tied" in model.notes[-1]) is tied and "random ids" in model.notes[-1]


def test_biases_are_divided_with_the_rows_they_belong_to(ids):
    reference, model = (random_tiny(attention_bias=True, mlp_bias=True) for _ in range(2))
    for part in (reference, model):
        generator = torch.Generator().manual_seed(3)
        for name, parameter in part.named_parameters():
            if name.endswith("bias"):
                parameter.data.normal_(generator=generator)
    smoothing.apply(model, **QUICK)
    assert torch.allclose(logits_of(model, ids), logits_of(reference, ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape,ratio", [("grouped", 0.25), ("three_a_group", 0.3)])
def test_works_on_pruned_heads(shape, ratio, ids):
    reference, model = (head_pruning.apply(random_tiny(shape), prune_ratio=ratio) for _ in range(2))
    smoothing.apply(model, **QUICK)
    assert torch.allclose(logits_of(model, ids), logits_of(reference, ids), atol=1e-4, rtol=1e-4)


def test_strength_zero_is_the_identity_and_the_technique_refuses_it():
    model = random_tiny()
    assert torch.equal(smoothing_factors(torch.rand(8), torch.rand(8), 0), torch.ones(8))
    before = model.state_dict()
    for seam in seams(model):
        migrate(seam, torch.rand(seam.readers[0].in_features), 0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="--strength 0"):
        smoothing.apply(model, strength=0)


def test_factors_are_the_formula_of_the_paper():
    x, w = torch.tensor([8.0, 0.5, 2.0]), torch.tensor([0.5, 2.0, 1.0])
    expected = x**0.75 / w**0.25
    assert torch.allclose(smoothing_factors(x, w, 0.75), expected / expected.log().mean().exp())
    assert smoothing_factors(torch.zeros(3), torch.zeros(3), 0.5).isfinite().all()


def test_full_strength_levels_all_channels(ids):
    model = smoothing.apply(with_outliers(random_tiny()), strength=1.0, **QUICK)
    places = list(seams(model))
    windows = torch.randint(model.config.vocab_size, (1, 512), generator=torch.Generator().manual_seed(0))
    for place, largest in zip(places, input_absmax(lambda: model(input_ids=windows), places), strict=True):
        if place.copies is None:
            assert largest.max() < 1.01 * largest.min()


def test_int8_per_token_gains(ids):
    exact = logits_of(with_outliers(random_tiny()), ids)

    def error(model):
        return (logits_of(quantization.apply(model, scheme="dynamic"), ids) - exact).square().mean()

    assert error(smoothing.apply(with_outliers(random_tiny()), **QUICK)) < 0.1 * error(with_outliers(random_tiny()))


@pytest.mark.parametrize("options", [{"strength": 1.5}, {"strength": -1}, {"calibration_tokens": 3}])
def test_bad_options_name_the_flag(options):
    with pytest.raises(ValueError, match="--" + next(iter(options)).replace("_", "-")):
        smoothing.check(make_tiny().config, **smoothing.apply.__kwdefaults__ | options)


def test_quantized_models_are_refused():
    with pytest.raises(ValueError, match="before"):
        smoothing.apply(quantization.apply(random_tiny()))


def test_command_line_defaults_are_applys(monkeypatch):
    seen = {}
    monkeypatch.setattr("experiment.run", lambda recipes, args, **_: seen.update(recipes) or 0)
    monkeypatch.setattr(cli, "parse", lambda parser, argv: parser.parse_args(argv))
    assert smoothing.main(["--then", "dynamic"]) == 0
    assert seen["smoothing"] == [("smoothing", smoothing.apply.__kwdefaults__), ("quantization", {"scheme": "dynamic"})]


@pytest.mark.parametrize("strength", [0.1, 0.9])
def test_quantization_does_not_smooth_a_second_time(strength, monkeypatch):
    """Its own strength would undo the one asked for: factors of two passes multiply to those of the last."""
    monkeypatch.setattr("optimizations.quantization.has_text", lambda model: True)
    model = quantization.apply(smoothing.apply(random_tiny(), strength=strength, **QUICK), scheme="dynamic")
    assert sum("smoothed" in note for note in model.notes) == 1
