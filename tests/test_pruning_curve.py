"""Points at equal bytes, and the map of what rounding costs: planned from the configuration, measured on tiny models."""

import json

import pytest
import torch
from conftest import make_tiny
from pipeline_model import save_tiny_model
from transformers import LlamaConfig

import charts
import layer_costs
import pruning_curve
from kernels.int4 import dequantize_int4, quantize_int4
from models import TINYLLAMA_SHAPE

SCORING_FLAGS = ["-n", "4", "-p", "8", "--quality-windows", "2", "--quality-window", "32"]


def test_points_remove_about_the_same_bytes():
    """SmolLM2's shape: 2, 4.5 and 9 % of its weights by heads and width, the nearest count by sublayers and blocks."""
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    points = pruning_curve.plan(config, pruning_curve.KINDS)
    assert list(points) == [
        "attention-3", "attention-7", "attention-14", "blocks-1", "blocks-2", "blocks-3",
        "heads-0.135", "heads-0.304", "heads-0.608", "width-0.034", "width-0.076", "width-0.152",
    ]  # fmt: skip
    assert list(pruning_curve.plan(config, ["heads", "width"], [0.0592])) == ["heads-0.4", "width-0.1"]
    assert points["heads-0.304"][1] == [("head_pruning", {"method": "calibrated", "prune_ratio": 0.304})]


def test_a_quarter_of_tinyllamas_heads_is_one_of_the_points():
    points = pruning_curve.plan(LlamaConfig(**TINYLLAMA_SHAPE), pruning_curve.KINDS)
    ratios = [steps[0][1]["prune_ratio"] for name, (_, steps) in points.items() if name.startswith("heads")]
    assert ratios[1] == pytest.approx(0.25, abs=0.01)
    assert sum(name.startswith("blocks") for name in points) == 2, "a block is 4.3 %: it is not measured twice"


def test_kv_heads_of_their_own_go_with_their_query_heads():
    """Without grouped heads a head takes rows of k_proj and v_proj along: half as many go for the same bytes."""
    shape = TINYLLAMA_SHAPE | {"num_key_value_heads": TINYLLAMA_SHAPE["num_attention_heads"]}
    config = LlamaConfig(**shape)
    weights = pruning_curve.count_weights(config)
    ((_, (_, steps)),) = pruning_curve.plan(config, ["heads"], [0.05]).items()
    going = steps[0][1]["prune_ratio"] * config.num_hidden_layers * weights.attention
    assert going / weights.streamed == pytest.approx(0.05, rel=0.01)


def test_a_curve_is_measured_kept_and_drawn(tmp_path, monkeypatch, capsys):
    """A point in a process of its own; the second run measures nothing and draws the same."""
    flags = ["-m", str(save_tiny_model(tmp_path / "model")), "-t", "1", *SCORING_FLAGS, "-o", str(tmp_path / "out")]
    assert pruning_curve.main([*flags, "--kinds", "blocks"]) == 0
    content = json.loads((tmp_path / "out" / pruning_curve.RESULTS).read_text())
    baseline, point = content["results"]
    assert (point["name"], point["status"]) == ("blocks-1", "ok") and point["bytes_per_token"] < 0.8 * baseline[
        "bytes_per_token"
    ]
    assert (tmp_path / "out" / "visualizations" / "equal_bytes.png").exists() and charts.stale(content, tmp_path / "out") == []
    assert "1 block: " in capsys.readouterr().out
    monkeypatch.setattr("worker.WorkerProcess.__init__", lambda *_: pytest.fail("measured again"))
    assert pruning_curve.main([*flags, "--kinds", "blocks"]) == 0


def test_weights_that_are_on_the_grid_cost_nothing():
    model, ids = make_tiny(hidden_size=128), torch.randint(1, 97, (2, 24), generator=torch.Generator().manual_seed(1))
    exact = model.model.layers[1].mlp.up_proj
    exact.weight.data = dequantize_int4(*quantize_int4(exact.weight.data, 64, search=False), 64)
    costs = layer_costs.by_kind(layer_costs.rounding_costs(model, ids), 3)
    assert costs["costs"]["up_proj"][1] < 1e-3 * costs["costs"]["up_proj"][0]
    assert set(costs["costs"]) == set(layer_costs.KINDS) and costs["lm_head"] > 0
    assert all(cost is not None and cost >= 0 for row in costs["costs"].values() for cost in row)
