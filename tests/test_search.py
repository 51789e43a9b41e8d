"""The search's arithmetic on made-up numbers, and stacks spelled in one line."""

import importlib
import math

import pytest
import torch
from conftest import make_tiny

import run_optimization
import search
import stacks
from search import Limits, Single, Stack

MACHINE = {"baseline_tpot_ms": 40.0}


def single(loss=0.0, streamed=400.0, ms=20.2, weights=400.0, rest=50.0, kv=4.0):
    low = loss - 0.001
    return Single(loss=loss, loss_low=low, streamed_mb=streamed, kv_mb=kv, weights_mb=weights, rest_mb=rest, tpot_ms=ms)


@pytest.fixture
def singles():
    """The lean pass, int8 at a quarter of the bytes, a tenth of the width at 0.92 of them, and an int8 cache."""
    return {
        "lean": single(loss=0.001),
        "int8": single(loss=0.006, streamed=100.0, ms=10.4, weights=110.0),
        "width10": single(loss=0.011, streamed=368.0, ms=18.6, weights=368.0),
        "kv8": single(loss=0.002, kv=2.0, ms=22.11, rest=49.0),
    }


def test_losses_add_up_while_bytes_and_the_time_for_each_multiply(singles):
    """The lean pass reads at 0.05 ms a MB, int8 at twice that, the pruned width at the same, the int8 cache at 1.1 of it."""
    stack = search.estimate(("", "width10", "int8", "kv8"), singles, **MACHINE)
    assert stack.name == "width10+int8+kv8+lean"
    assert stack.retention == pytest.approx(math.exp(-(0.001 + 0.005 + 0.010 + 0.001)))
    assert stack.megabytes_per_token == pytest.approx(100 * 0.92 + 2.0)
    assert 40 / stack.speedup == pytest.approx((92 + 2) * 0.05 * 2 * 1 * 1.1)
    assert stack.memory_mb == pytest.approx(110 * 0.92 + 50 - 1)


def test_a_stack_of_one_choice_is_what_was_measured(singles):
    stack = search.estimate(search.alone("int8"), singles, **MACHINE)
    assert stack.retention == pytest.approx(math.exp(-0.006)) and stack.memory_mb == pytest.approx(160)
    assert search.estimate(search.alone("lean"), singles, **MACHINE).retention == pytest.approx(math.exp(-0.001))


def test_only_what_was_measured_is_combined(singles):
    names = {stack.name for stack in search.all_stacks(singles, **MACHINE)}
    assert len(names) == 2 * 2 * 2 and "lean" in names and not any("heads" in name or "half" in name for name in names)
    assert len(search.all_stacks({name: single() for name in search.BY_EXPENSE}, **MACHINE)) == 3 * 2 * 6 * 2


def test_the_share_that_pruning_takes_away_is_that_of_the_model():
    """Counted on real modules: rows of q_proj and columns of o_proj; with a KV head for each query head k and v too."""
    for kv_heads, projections in ((2, "qo"), (8, "qkvo")):
        model = make_tiny("grouped", num_key_value_heads=kv_heads, num_attention_heads=8)
        read = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
        attention = sum(
            getattr(layer.self_attn, f"{p}_proj").weight.numel() for layer in model.model.layers for p in projections
        )
        assert search.pruned_share("heads25", model.config) == pytest.approx(0.25 * attention / read)
        width = sum(weight.numel() for layer in model.model.layers for weight in layer.mlp.parameters())
        assert search.pruned_share("width10", model.config) == pytest.approx(0.1 * width / read)
        assert search.pruned_share("int8", model.config) is None and search.pruned_share("lean", model.config) is None


def test_every_choice_is_measured_once_and_exists():
    listed = [name for names in search.AXES.values() for name in names if name]
    assert sorted([*listed, "lean"]) == sorted(search.BY_EXPENSE)
    for name in search.BY_EXPENSE:
        for technique, options in search.steps_of(search.alone(name)):
            assert set(options) <= set(importlib.import_module(f"optimizations.{technique}").apply.__kwdefaults__ or {})


def test_the_front_holds_what_nothing_beats():
    rows = [(1, 9), (5, 5), (4, 5), (9, 1), (5, 5), (8, 0)]
    assert search.front(rows, lambda row: row) == [(1, 9), (5, 5), (9, 1)]


def test_a_harsher_choice_is_hopeless_after_a_milder_one_that_lost_too_much(singles):
    limits = Limits(0.97)
    singles["int4-6bit"] = single(loss=0.05)
    assert search.hopeless("int4-4.6bit", singles, limits) == "int4-6bit"
    assert search.hopeless("int4-4.6bit", singles, Limits(0.9)) is None
    assert search.hopeless("heads25", singles, limits) is None, "another axis says nothing of it"
    singles["int4-6bit"] = single(loss=-math.log(0.97) + 0.0005)
    assert search.hopeless("int4-4.6bit", singles, limits) is None, "the interval reaches what is allowed"


def stack(name, speedup, retention, memory=100.0, weights=""):
    return Stack(("", name, weights, ""), retention, speedup, memory, 100.0)


def test_the_fastest_that_keep_the_limits_are_measured_and_a_safe_one():
    every = [stack(f"fast{n}", 5 - n / 10, 0.975, weights="int4") for n in range(4)]
    every += [stack("other", 4, 0.972, weights="int8"), stack("safe", 3, 0.99, weights="int8"), stack("lossy", 9, 0.9)]
    chosen = search.worth_measuring(every, Limits(0.97))
    assert [one.choices[1] for one in chosen] == ["fast0", "fast1", "other", "safe"]
    assert [one.choices[1] for one in search.worth_measuring(every, Limits(0.97, min_speedup=4.5))] == ["fast0", "fast1"]


def test_where_nothing_should_keep_the_limits_the_nearest_are_measured():
    every = [stack("a", 2, 0.9), stack("b", 3, 0.94), stack("c", 4, 0.8)]
    assert [one.choices[1] for one in search.worth_measuring(every, Limits(0.97))] == ["b", "a"]


def record(name, speedup, retention, low, memory, status="ok"):
    return {"name": name, "status": status, "speedup": speedup, "perplexity_retention": retention, "peak_memory_mb": memory,
            "perplexity_retention_ci": [low, retention + 0.002] if low else None}  # fmt: skip


RECORDS = [
    record("baseline", 1.0, 1.0, 1.0, 500), record("int8", 3.0, 0.995, 0.99, 150), record("int4", 4.0, 0.973, 0.968, 120),
    record("slow", 2.0, 0.994, 0.99, 160), record("broken", None, None, None, None, status="failed"),
]  # fmt: skip


def test_the_lower_end_of_the_interval_decides():
    found, nearest = search.choose(RECORDS, Limits(0.97))
    assert found["name"] == "int8" and nearest is None
    assert search.choose(RECORDS, Limits(0.96))[0]["name"] == "int4"
    assert search.choose([record("short", 2.0, 0.98, None, 9)], Limits(0.97))[0]["name"] == "short"


def test_where_nothing_keeps_the_limits_the_nearest_is_named():
    limits = Limits(0.98, max_memory_mb=110, min_speedup=3.9)
    found, nearest = search.choose(RECORDS, limits)
    assert found is None and nearest["name"] == "int4"
    assert search.missed(nearest, limits) == {
        "retention": pytest.approx(1 - 0.968 / 0.98),
        "memory": pytest.approx(120 / 110 - 1),
    }
    assert search.choose([RECORDS[4]], limits) == (None, None)


def test_the_measured_front_leaves_out_what_is_beaten():
    assert [row["name"] for row in search.measured_front(RECORDS)] == ["int4", "int8", "baseline"]


# Stacks in one line


def test_a_spelled_stack_is_read():
    text = "head_pruning:method=calibrated, prune_ratio=0.1+ int4:int8_layers=lm_head,down_proj,max_bits=6 +lean_decode"
    assert stacks.parse_stack(text) == [
        ("head_pruning", {"method": "calibrated", "prune_ratio": 0.1}),
        ("int4", {"int8_layers": "lm_head,down_proj", "max_bits": 6.0}),
        ("lean_decode", {}),
    ]


@pytest.mark.parametrize("steps", [recipe[1] for recipe in run_optimization.RECIPES.values()])
def test_what_is_spelled_is_read_again_as_the_same(steps):
    again = stacks.parse_stack(stacks.spell(steps))
    resolved = run_optimization.experiment.records.resolved
    assert resolved(again) == resolved(steps)


def test_values_take_the_type_of_the_default():
    assert stacks.parse_stack("mixed_precision:untie=true") == [("mixed_precision", {"untie": True})]
    assert stacks.parse_stack("quantization:smoothing=0.5,group_size=32") == [
        ("quantization", {"smoothing": 0.5, "group_size": 32})
    ]
    assert stacks.spell([("quantization", {"smoothing": None}), ("mixed_precision", {"untie": True})]) == (
        "quantization + mixed_precision:untie=true"
    )


def test_a_stack_of_any_length_names_a_file():
    name = stacks.file_name("int4:int8_layers=" + ",".join(f"layers.{n}.mlp.down_proj" for n in range(40)))
    assert len(name) < 140 and "/" not in stacks.file_name("a/b: c") and ":" not in name
