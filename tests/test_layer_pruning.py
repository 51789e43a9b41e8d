"""Whole sublayers and blocks: what is removed is what a zeroed contribution would compute, and its KV cache is gone too."""

import copy

import pytest
import torch
from conftest import logits_of, stepwise_logits
from transformers import DynamicCache

import models
from benchmark import cache_bytes, count_parameters, evidence, new_cache, time_generation, weight_bytes
from fitting import calibration_cache
from inference import generate_ids
from optimizations import head_pruning, kv_cache_quant, layer_pruning, mlp_pruning, quantization
from optimizations.layer_pruning import apply, check, choose


@pytest.fixture
def model(tiny, monkeypatch, tmp_path):
    """Four layers whose calibration windows are random ids, and a calibration cache of the test's own."""
    monkeypatch.setattr(calibration_cache, "ROOT", tmp_path / "calibration")
    model = tiny("grouped", num_hidden_layers=4)
    model.source = models.ModelSource("tiny", "random", "")
    return model


def masked_like(model, what, gone):
    masked = copy.deepcopy(model)
    for index in gone:
        masked.model.layers[index].self_attn.o_proj.weight.data.zero_()
        if what == "blocks":
            masked.model.layers[index].mlp.down_proj.weight.data.zero_()
    return masked


def chosen(model, what, count):
    windows = layer_pruning.calibration.refit_windows(model)
    return choose(model, layer_pruning.probe_windows(windows), what=what, count=count)


@pytest.mark.parametrize("what", ["attention", "blocks"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_structural_equals_masked(model, ids, what, count):
    """In one pass, token by token through either cache, and through `generate`, beams and a padded batch included."""
    masked = masked_like(model, what, chosen(model, what, count)[0])
    pruned = apply(copy.deepcopy(model), what=what, count=count)
    expected = logits_of(masked, ids)
    for actual in (logits_of(pruned, ids), stepwise_logits(pruned, ids, new_cache(pruned))):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
    for options in ({}, {"num_beams": 3}):
        tokens = generate_ids(masked, ids[:, :8], max_new_tokens=6, **options)
        assert torch.equal(generate_ids(pruned, ids[:, :8], max_new_tokens=6, **options), tokens)
    eight = kv_cache_quant.apply(pruned)
    assert (stepwise_logits(eight, ids, new_cache(eight)) - expected).abs().max() < 0.5
    assert generate_ids(eight, ids[:, :8], max_new_tokens=6, num_beams=2).shape == (2, 14)


@pytest.mark.parametrize("what", ["attention", "blocks"])
def test_parameters_and_cache_really_go(model, ids, what):
    dense, dense_cache = copy.deepcopy(model), DynamicCache(config=model.config)
    logits_of(dense, ids, dense_cache)
    pruned = apply(model, what=what, count=2)
    one = dense.model.layers[0]
    parts = [one.self_attn, one.input_layernorm] if what == "attention" else [one]
    fewer = 2 * sum(parameter.numel() for part in parts for parameter in part.parameters())
    assert count_parameters(dense) - count_parameters(pruned) == fewer
    assert weight_bytes(dense) - weight_bytes(pruned) == 4 * fewer
    cache = new_cache(pruned)
    logits_of(pruned, ids, cache)
    assert cache_bytes(cache) == cache_bytes(dense_cache) // 2
    assert evidence(pruned)["layers"] == 2 and evidence(pruned)["kv_heads"] == 4
    assert time_generation(pruned, ids, new_tokens=3).kv_cache_bytes > 0
    assert f"removed 2 {'attention sublayers' if what == 'attention' else 'blocks'}" in pruned.notes[-1]
    if what == "blocks":
        assert pruned.config.num_hidden_layers == len(pruned.model.layers) == 2


@pytest.mark.parametrize("what", ["attention", "blocks"])
def test_a_layer_that_writes_nothing_goes_first(model, ids, what):
    """Its removal costs nothing, and is found wherever it stands; the model is left as it was while looking."""
    model.model.layers[2].self_attn.o_proj.weight.data.zero_()
    model.model.layers[2].mlp.down_proj.weight.data.zero_()
    dense = logits_of(model, ids)
    gone, costs = chosen(model, what, 1)
    assert gone == [2] and costs[0] == pytest.approx(0, abs=1e-6)
    assert torch.equal(logits_of(model, ids), dense)
    torch.testing.assert_close(logits_of(apply(model, what=what, count=1), ids), dense, atol=1e-5, rtol=0)


def test_the_search_goes_on_where_it_ended(model, monkeypatch):
    """Three removals begin with the two that are known; known ones are not measured again."""
    two = chosen(model, "attention", 2)
    three = chosen(model, "attention", 3)
    assert three[0][:2] == two[0] and three[1][:2] == two[1]
    monkeypatch.setattr(layer_pruning, "Divergence", None)
    assert chosen(model, "attention", 2) == two


def test_other_techniques_after_and_before(model, ids):
    """Heads and width first, layers next, int8 last; the other way round is refused with the order that works."""
    narrow = mlp_pruning.apply(head_pruning.apply(copy.deepcopy(model), prune_ratio=0.15), prune_ratio=0.2)
    stacked = quantization.apply(apply(narrow, what="attention", count=1), scheme="weight-only")
    assert torch.isfinite(stepwise_logits(stacked, ids, new_cache(stacked))).all()
    smooth = quantization.apply(apply(copy.deepcopy(model), what="attention", count=1), scheme="dynamic")
    assert torch.isfinite(stepwise_logits(smooth, ids, new_cache(smooth))).all()
    apply(model, what="attention", count=1)
    for technique in (head_pruning, mlp_pruning):
        with pytest.raises(ValueError, match="before layer_pruning"):
            technique.apply(model)
    again = apply(model, what="blocks", count=1)
    assert evidence(again)["layers"] in (2, 3) and torch.isfinite(logits_of(again, ids, new_cache(again))).all()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"what": "heads"}, "--what heads.*attention or blocks"),
        ({"count": 0}, "--count 0.*1 to 3"),
        ({"count": 4}, "--count 4.*1 to 3"),
    ],
)
def test_bad_options_are_refused_before_weights(model, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        check(model.config, **apply.__kwdefaults__ | options)
    with pytest.raises(ValueError, match=sentence):
        apply(model, **options)


def test_some_attention_stays(model):
    apply(model, what="attention", count=2)
    with pytest.raises(ValueError, match=r"--count 2.*no attention"):
        apply(model, what="attention", count=2)
