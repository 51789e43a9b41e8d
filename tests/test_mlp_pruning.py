"""MLP width: what is cut is what zeroed channels with the same refitted weights would compute, in multiples of 16."""

import copy

import pytest
import torch
from conftest import logits_of, stepwise_logits

import models
from benchmark import count_parameters, new_cache, weight_bytes
from fitting import calibration, calibration_cache, compensation
from inference import generate_ids
from kernels.modules import cut_linear
from optimizations import mlp_pruning
from optimizations.kv_cache_quant import Int8Cache
from optimizations.mlp_pruning import apply, check


@pytest.fixture
def model(tiny, monkeypatch, tmp_path):
    """A tiny model whose calibration windows are random ids, and a calibration cache of the test's own."""
    monkeypatch.setattr(calibration_cache, "ROOT", tmp_path / "calibration")
    model = tiny("three_a_group")
    model.source = models.ModelSource("tiny", "random", "")
    return model


def widths(model):
    return [layer.mlp.down_proj.in_features for layer in model.model.layers]


@pytest.mark.parametrize("ratio", [0.1, 0.4])
def test_structural_equals_masked(model, ids, ratio, monkeypatch):
    """The same channels zeroed at down_proj's input, with the refitted weights in the columns that stay."""
    kept = []
    cut = mlp_pruning.keep_channels
    monkeypatch.setattr(mlp_pruning, "keep_channels", lambda mlp, channels: (kept.append((mlp, channels)), cut(mlp, channels)))
    pruned = apply(copy.deepcopy(model), prune_ratio=ratio)
    channels_of = {id(mlp): channels for mlp, channels in kept}
    masked = copy.deepcopy(model)
    for ours, theirs in zip(pruned.model.layers, masked.model.layers, strict=True):
        theirs.self_attn.o_proj.weight = ours.self_attn.o_proj.weight
        channels = channels_of.get(id(ours.mlp), torch.arange(288))
        theirs.mlp.down_proj.weight.data.zero_()
        theirs.mlp.down_proj.weight.data[:, channels] = ours.mlp.down_proj.weight
    expected = logits_of(masked, ids)
    for actual in (logits_of(pruned, ids), stepwise_logits(pruned, ids, new_cache(pruned))):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
    assert (stepwise_logits(pruned, ids, Int8Cache()) - expected).abs().max() < 0.5
    tokens = generate_ids(masked, ids[:, :8], max_new_tokens=6)
    assert torch.equal(generate_ids(pruned, ids[:, :8], max_new_tokens=6), tokens)


@pytest.mark.parametrize("ratio", [0.02, 0.1, 0.25, 0.5])
def test_removes_what_it_says(model, ratio):
    """To the nearest 16 channels of the whole model; parameters and bytes fall by three rows or columns a channel."""
    pruned = apply(copy.deepcopy(model), prune_ratio=ratio)
    gone = 3 * 288 - sum(widths(pruned))
    assert abs(gone - ratio * 3 * 288) <= 8 and all(width % 16 == 0 for width in widths(pruned))
    assert count_parameters(model) - count_parameters(pruned) == 3 * 144 * gone
    assert weight_bytes(model) - weight_bytes(pruned) == 4 * 3 * 144 * gone
    assert f"removed {gone / 864:.1%} of the MLP channels" in pruned.notes[-1]


def test_dead_channels_go_first_and_cost_nothing(model, ids):
    """Channels whose down_proj columns are zero are chosen, and refitting leaves a model without loss what it was."""
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data[:, 40:88] = 0
    dense = logits_of(model, ids)
    pruned = apply(copy.deepcopy(model), prune_ratio=1 / 6)
    assert widths(pruned) == [240, 240, 240]
    torch.testing.assert_close(logits_of(pruned, ids), dense, atol=1e-3, rtol=0)


def test_refit_of_nothing_is_the_identity(tiny, ids, tmp_path):
    """When `cut` removes nothing the dense weights already reach their target: no refit beats them by more than rounding.
    Biases are no part of what is refitted."""
    model, generator = tiny("three_a_group", attention_bias=True, mlp_bias=True), torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data.normal_(generator=generator)
    dense = logits_of(model, ids)
    windows = torch.randint(1, 97, (4, 64), generator=torch.Generator().manual_seed(3))
    cache = calibration_cache.CalibrationCache(tmp_path / "identity")
    compensation.refit_in_order(model, windows, cut=lambda index: {}, cache=cache)
    torch.testing.assert_close(logits_of(model, ids), dense, atol=1e-3, rtol=0)


def test_what_was_calibrated_belongs_to_one_architecture(model):
    """The same weights with another epsilon or other angles are another model."""
    windows, of = torch.zeros(1, 4, dtype=torch.int64), calibration_cache.CalibrationCache.of
    folders = [of(model, windows).folder]
    model.config.rms_norm_eps *= 2
    folders.append(of(model, windows).folder)
    model.config.rope_parameters = model.config.rope_parameters | {"rope_theta": 123.0}
    folders.append(of(model, windows).folder)
    assert len(set(folders)) == 3


def test_what_a_killed_process_left_half_written_goes(tmp_path):
    cache = calibration_cache.CalibrationCache(tmp_path)
    (tmp_path / f"old.json.{2**22 + 1}.part").write_text("half")
    (tmp_path / "other.json.1.part").write_text("of a process that lives")
    cache.save_json("new", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.json", "other.json.1.part"]


def test_a_token_counts_by_what_the_next_norm_lets_through(model, tmp_path, monkeypatch):
    """One token's stream is thousands of times longer: its row in a regression is as much shorter, or it would decide."""
    rows = []

    class Spy(compensation.Regression):
        def add(self, x, y):
            rows.append((x, y))
            super().add(x, y)

    monkeypatch.setattr(compensation, "Regression", Spy)
    windows = torch.randint(2, 97, (4, 32), generator=torch.Generator().manual_seed(3))
    windows[:, 0] = 1
    model.get_input_embeddings().weight.data[1] *= 10_000
    cache = calibration_cache.CalibrationCache(tmp_path / "giant")
    compensation.refit_in_order(model, windows, cut=lambda index: {}, cache=cache)
    assert len(rows) == 4 * 2 * 3
    for x, y in rows:
        assert x[0].norm() < 0.05 * x[1:].norm(dim=1).median() and y.isfinite().all()


def test_refitting_a_large_model_reads_less_text():
    """TinyLlama's streams of as many tokens as the embedded model's would pass 8 GB beside its weights."""
    small = models.LlamaConfig(hidden_size=576, intermediate_size=1536)
    large = models.LlamaConfig(**models.TINYLLAMA_SHAPE)
    assert calibration.refit_tokens(small) == calibration.REFIT_TOKENS
    assert 30_000 < calibration.refit_tokens(large) < 40_000


def test_healing_is_reported_apart(model):
    healed = apply(model, prune_ratio=0.3, heal_minutes=0.02)
    assert "MLP channels" in healed.notes[-2] and "healed in" in healed.notes[-1]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"prune_ratio": 0.0}, "--prune-ratio 0.0.*between 0 and 1"),
        ({"prune_ratio": 1.0}, "--prune-ratio 1.0.*between 0 and 1"),
        ({"prune_ratio": 0.001}, "--prune-ratio 0.001.*choose more"),
        ({"prune_ratio": 0.9}, "--prune-ratio 0.9.*at most"),
        ({"heal_minutes": -2}, "--heal-minutes -2"),
    ],
)
def test_bad_options_are_refused_before_weights(model, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        check(model.config, **apply.__kwdefaults__ | options)
    with pytest.raises(ValueError, match=sentence):
        apply(model, **options)


def test_width_that_is_no_multiple_of_a_panel(tiny):
    with pytest.raises(ValueError, match=r"200 channels.*panels of 16"):
        check(tiny(intermediate_size=200).config, **apply.__kwdefaults__)


def test_twice_and_quantised_models_are_refused(model):
    apply(model, prune_ratio=0.1)
    with pytest.raises(ValueError, match="apply mlp_pruning once"):
        apply(model, prune_ratio=0.1)
    model.model.layers[0].mlp.down_proj = torch.nn.Identity()
    with pytest.raises(ValueError, match="run mlp_pruning before"):
        apply(model, prune_ratio=0.1)


def test_what_was_calibrated_belongs_to_its_text_and_code(model):
    of, windows = calibration_cache.CalibrationCache.of, torch.zeros(1, 4, dtype=torch.int64)
    caches = [of(model, windows), of(model, windows + 1), of(model, windows, code=("gptq.py",)), of(model, windows, minutes=1)]
    assert len({cache.folder for cache in caches}) == 4 and of(model, windows).folder == caches[0].folder


def test_a_layer_cut_down_has_the_rest_of_its_bias():
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(5, 7), torch.randn(3, 5)
    rows, columns = torch.tensor([0, 2, 6]), torch.tensor([1, 4])
    torch.testing.assert_close(cut_linear(linear, rows=rows)(x), linear(x)[:, rows])
    alone = torch.zeros_like(x)
    alone[:, columns] = x[:, columns]
    torch.testing.assert_close(cut_linear(linear, columns=columns)(x[:, columns]), linear(alone))
