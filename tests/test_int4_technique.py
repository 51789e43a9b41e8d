"""The int4 technique: bytes really fall, bits are counted, the layers that hurt most get int8, results are found again."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import logits_of, make_tiny

import benchmark
import fitting.blockwise
import models
from fitting import calibration, calibration_cache
from fitting.blockwise import RoundedLinear
from fitting.gptq import gptq_refined
from fitting.sensitivity import added_bits, choose_upgrades, loss_increases
from kernels.int4 import dequantize_int4
from kernels.int4_modules import Int4Linear
from kernels.int8 import dequantize_groups, quantize_groups
from kernels.int8_modules import Int8Linear
from models import ModelSource
from optimizations import head_pruning, int4, layer_pruning, quantization, smoothing

CALIBRATION = torch.randint(1, 97, (4, 64), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def calibrated(monkeypatch, tmp_path):
    """A cache of its own, and random ids for text."""
    monkeypatch.setattr(calibration_cache, "ROOT", tmp_path / "cache")
    monkeypatch.setattr(calibration, "calibration_ids", lambda model, **_: CALIBRATION)


def tiny(*args, random_weights=False, **kwargs):
    model = make_tiny(*args, **kwargs)
    real = SimpleNamespace(name="tiny", kind="folder", random_weights=False)
    model.source = ModelSource("tiny", "random", "") if random_weights else real
    return model


def closeness(logits, expected):
    return torch.cosine_similarity(logits.flatten(), expected.flatten(), dim=0)


def with_weights_of(model, plain):
    """`plain`, in floating point, with the weights that the quantised `model` stands for."""
    for name, module in plain.named_modules():
        if name.endswith(("_proj", "lm_head")):
            module.weight.data = model.get_submodule(name).rows(torch.arange(module.out_features))
    plain.get_input_embeddings().weight.data = model.get_input_embeddings()(torch.arange(97))
    return plain


def kinds(model, kind):
    return {name for name, module in model.named_modules() if isinstance(module, kind)}


def test_a_layer_without_attention_is_its_mlp(ids):
    """Rounded by GPTQ and tuned like the others, nearer to what it was than rounded to nearest; bits count what is there."""
    dense = layer_pruning.apply(tiny("three_a_group"), what="attention", count=1)
    expected = logits_of(dense, ids)
    rounded = int4.apply(copy.deepcopy(dense), int8_layers="none", group_size=32, tune_steps=2)
    nearest = int4.apply(dense, int8_layers="none", group_size=32, rounding="nearest")
    assert len(kinds(rounded, Int4Linear)) == 1 + 3 * 7 - 4 and rounded.effective_bits == nearest.effective_bits
    assert closeness(logits_of(rounded, ids), expected) > closeness(logits_of(nearest, ids), expected)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shape", ["grouped", "three_a_group"])
def test_bytes_fall_and_bits_are_counted(shape, tied, ids, monkeypatch):
    monkeypatch.setenv("TINYOPT_NO_KERNELS", "1")  # the kernels' panels are padded, which counts on models so narrow
    reference = tiny(shape, tied=tied)
    model = int4.apply(tiny(shape, tied=tied), rounding="nearest", int8_layers="none", group_size=32)
    assert closeness(logits_of(model, ids), logits_of(with_weights_of(model, tiny(shape, tied=tied)), ids)) > 0.99
    assert closeness(logits_of(model, ids), logits_of(reference, ids)) > 0.75  # random weights amplify what is rounded
    assert not kinds(model, Int8Linear) and benchmark.count_parameters(model) == benchmark.count_parameters(reference)
    padding = 0.5 if shape == "three_a_group" else 0  # 144 inputs are four groups and a half
    assert 5 <= model.effective_bits <= 5 + padding
    assert benchmark.weight_bytes(model) < 0.2 * benchmark.weight_bytes(reference)
    rows = torch.tensor([[0, 96]])
    looked_up = model.get_input_embeddings()(rows)
    assert (looked_up - reference.get_input_embeddings()(rows)).abs().max() < 0.2
    if tied:
        assert torch.equal(looked_up[0], model.lm_head.rows(rows[0]))


def test_gptq_keeps_more_than_rounding_to_nearest():
    exact = logits_of(tiny(), CALIBRATION)

    def error(**options):
        return (logits_of(int4.apply(tiny(), int8_layers="none", tune_steps=0, **options), CALIBRATION) - exact).square().mean()

    assert error() < 0.8 * error(rounding="nearest")


@torch.no_grad()
def rounded_slowly(model, ids, group_size, damping):
    """Codes of each linear layer by name: the whole model runs anew for each stage, as rounded by then."""
    forms, seen = {}, []
    stages = [[f"model.layers.{i}.{name}" for name in stage] for i in range(3) for stage in fitting.blockwise.STAGES]
    for stage in [*stages, ["lm_head"]]:
        handle = model.get_submodule(stage[0]).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, 1)))
        model(ids)
        handle.remove()
        x = dequantize_groups(*quantize_groups(seen.pop(), group_size), group_size)
        for name in stage:
            linear = model.get_submodule(name)
            forms[name] = gptq_refined(linear.weight, x.T @ x / len(x), group_size=group_size, damping=damping)
            rounded = dequantize_int4(*forms[name], group_size)
            model.set_submodule(name, RoundedLinear(linear, rounded, group_size, torch.float32))
    return {name: codes for name, (codes, _, _) in forms.items()}


def test_block_by_block_equals_the_whole_model_stage_by_stage(monkeypatch):
    """Sums in another order move a code in a hundred; codes for the inputs of the dense model are others."""
    monkeypatch.setattr(fitting.blockwise, "has_half_arithmetic", lambda *_: (False, ""))
    model = tiny("three_a_group")
    forms = fitting.blockwise.round_blockwise(model, CALIBRATION, group_size=32, damping=0.01, tied=False)
    expected = rounded_slowly(model, CALIBRATION, 32, 0.01)
    assert forms.keys() == expected.keys()
    assert all((forms[name][0] != codes).float().mean() < 0.01 for name, codes in expected.items())


def test_the_model_is_only_borrowed_while_it_is_walked():
    model = tiny()
    modules, before = dict(model.named_modules()), {name: p.clone() for name, p in model.named_parameters()}
    forms = fitting.blockwise.round_blockwise(model, CALIBRATION, group_size=32, damping=0.01, tied=False)
    assert len(forms) == 3 * 7 + 1
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("max_bits", [5.4, 9.1])
def test_auto_stays_within_its_bits(tied, max_bits, monkeypatch):
    monkeypatch.setenv("TINYOPT_NO_KERNELS", "1")  # as above: 97 tokens are padded to 112
    model = int4.apply(tiny(tied=tied), group_size=32, max_bits=max_bits, rounding="nearest")
    assert 5 <= model.effective_bits <= max_bits
    assert bool(kinds(model, Int8Linear)) and bool(kinds(model, Int4Linear)) is (max_bits < 9)
    assert f"{model.effective_bits:.2f} bits" in model.notes[-1]


def test_names_choose_kinds_and_single_layers():
    model = int4.apply(tiny(), int8_layers="down_proj, layers.1.self_attn.q_proj", rounding="nearest")
    expected = {f"model.layers.{index}.mlp.down_proj" for index in range(3)} | {"model.layers.1.self_attn.q_proj"}
    assert kinds(model, Int8Linear) == expected


def test_estimated_costs_are_those_of_the_loss():
    """Against the loss really measured with one layer changed a little: the right size, and the right order."""
    model = tiny()
    torch.manual_seed(0)
    names = [f"model.layers.1.{name}" for name in ("self_attn.o_proj", "mlp.down_proj", "mlp.up_proj")] + ["lm_head"]
    changes = {name: torch.randn_like(model.get_submodule(name).weight) * 0.01 for name in names}
    changes["model.layers.1.mlp.up_proj"] *= 10
    estimated = loss_increases(model, CALIBRATION, {name: (lambda change=change: change) for name, change in changes.items()})
    assert estimated["model.layers.1.mlp.up_proj"] > 20 * estimated["model.layers.1.mlp.down_proj"]
    assert all(cost > 0 for cost in estimated.values()) and not model.get_input_embeddings().weight.requires_grad


def test_upgrades_are_the_most_costly_per_bit_that_fit():
    costs, bits = {"a": 4.0, "b": 3.0, "c": 1.0}, {"a": 4, "b": 1, "c": 2}
    assert choose_upgrades(costs, bits, 7) == ["b", "a", "c"]
    assert choose_upgrades(costs, bits, 3) == ["b", "c"]
    added, spent = added_bits({"x": (3, 96)}, 64)
    assert added == {"x": 3 * (96 * 4 - 2 * 16)} and spent == 3 * (96 * 4 + 2 * 32)


def test_bits_are_counted_as_they_are_stored(monkeypatch):
    monkeypatch.setenv("TINYOPT_NO_KERNELS", "1")  # the kernels' panels are padded
    linear = torch.nn.Linear(96, 48, bias=False)
    parts = (Int4Linear(linear, group_size=32), Int8Linear(linear, group_size=32, int8_activations=True))
    int4_bits, int8_bits = (8 * sum(buffer.nbytes for buffer in part.buffers()) for part in parts)
    assert added_bits({"x": (48, 96)}, 32) == ({"x": int8_bits - int4_bits}, int4_bits)


def test_layers_of_one_product_are_upgraded_together():
    """v_proj alone is worth most per bit, but with q and k, which it runs with, it comes after o_proj."""
    block = "model.layers.1.self_attn."
    costs = {f"{block}q_proj": 0.1, f"{block}k_proj": 0.1, f"{block}v_proj": 3.0, f"{block}o_proj": 2.0, "lm_head": 0.1}
    bits = {f"{block}q_proj": 3, f"{block}k_proj": 1, f"{block}v_proj": 1, f"{block}o_proj": 3, "lm_head": 1}
    fused = [f"{block}{name}_proj" for name in "qkv"]
    assert choose_upgrades(costs, bits, 9) == [f"{block}o_proj", *fused, "lm_head"]
    assert choose_upgrades(costs, bits, 7) == [f"{block}o_proj", "lm_head"], "no part of a product that does not fit"
    mlp = {f"model.layers.{index}.mlp.{name}": 1.0 + index for index in (0, 1) for name in ("gate_proj", "up_proj")}
    assert choose_upgrades(mlp, dict.fromkeys(mlp, 2), 6) == ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"]


def test_the_search_leaves_every_product_of_one_precision():
    model = int4.apply(tiny(), group_size=32, max_bits=6.5, rounding="nearest")
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for product in ((attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)):
            assert len({type(part) for part in product}) == 1


def test_the_second_run_reads_what_the_first_wrote(monkeypatch, ids):
    first = int4.apply(tiny(), max_bits=6)
    untuned = int4.apply(tiny(), max_bits=6, tune_steps=0)
    monkeypatch.setattr(int4, "round_blockwise", None)
    monkeypatch.setattr(int4, "tune", None)
    assert torch.equal(logits_of(int4.apply(tiny(), max_bits=6), ids), logits_of(first, ids))
    assert torch.equal(logits_of(int4.apply(tiny(), max_bits=6, tune_steps=0), ids), logits_of(untuned, ids))
    files = list(calibration_cache.ROOT.glob("*/*.safetensors"))
    assert sorted(file.stem for file in files) == ["answers", "gptq", "tuned"]
    for file in files:
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(TypeError):  # half a file counts as none
        int4.apply(tiny(), max_bits=6)
    with pytest.raises(TypeError):  # and another model's is not taken
        int4.apply(tiny(seed=1), max_bits=6)


def test_one_rounding_serves_every_width(monkeypatch):
    """More layers in int8 need no other rounding, and those are not tuned."""
    narrow = int4.apply(tiny(), max_bits=5.1, tune_steps=0)
    assert "lm_head" not in kinds(narrow, Int8Linear)
    monkeypatch.setattr(int4, "round_blockwise", None)
    tuned = {}
    monkeypatch.setattr(int4, "tune", lambda model, ids, forms, **_: (tuned.update(forms) or forms, {}))
    wide = int4.apply(tiny(), max_bits=8)
    assert kinds(wide, Int8Linear) > kinds(narrow, Int8Linear)
    assert tuned.keys() == kinds(wide, Int4Linear)


def test_random_weights_are_rounded_to_nearest_and_say_so(monkeypatch):
    monkeypatch.setattr(int4, "round_blockwise", None)
    model = int4.apply(tiny(random_weights=True), max_bits=6)
    assert "random weights" in model.notes[-1] and "lm_head" in kinds(model, Int8Linear)
    assert not calibration_cache.ROOT.exists()


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_random_weights_come_as_near_the_bits_asked_for_as_others(bits, monkeypatch):
    """By position, too, every kind of layer can have int8: TinyLlama's lm_head and down_proj alone would end at 5.6 bits."""
    monkeypatch.setenv("TINYOPT_NO_KERNELS", "1")  # whose panels are padded
    model = int4.apply(tiny("three_a_group", random_weights=True), max_bits=bits)
    assert bits - 0.7 < model.effective_bits <= bits


def test_a_file_that_was_rounded_before_is_named(monkeypatch):
    """And the bits of a weight are seen on the model, as evidence."""
    model = tiny(random_weights=True)
    monkeypatch.setattr(models, "rounded_as", lambda source: "Q4_1")
    int4.apply(model, int8_layers="none")
    assert "to Q4_1: another grid" in model.notes[-1] and benchmark.evidence(model)["effective_bits"] == model.effective_bits


def test_works_after_smoothing_and_pruning(ids):
    model = head_pruning.apply(smoothing.apply(tiny("three_a_group")), prune_ratio=0.3)
    expected = logits_of(model, ids)
    int4.apply(model)
    assert closeness(logits_of(model, ids), expected) > 0.75


def test_a_tied_tables_precision_is_lm_heads():
    tied, named = (int4.apply(tiny(tied=True), rounding="nearest", int8_layers=name) for name in ("embed_tokens", "lm_head"))
    assert isinstance(tied.lm_head, Int8Linear) and tied.effective_bits == named.effective_bits


def test_a_model_of_ones_own_is_rounded_to_nearest():
    """What models.load_model did not make says nothing of a tokenizer, so there is no text to calibrate on."""
    model = int4.apply(make_tiny(), int8_layers="none")
    assert "no text to calibrate on" in " ".join(model.notes)


BAD = [
    {"group_size": 48}, {"rounding": "up"}, {"int8_layers": "mlp2"}, {"int8_layers": ","}, {"max_bits": 4.4}, {"damping": 0},
    {"calibration_tokens": 1}, {"tune_steps": -1}, {"int8_layers": "layers.3.mlp.down_proj"},
]  # fmt: skip


@pytest.mark.parametrize("options", BAD)
def test_bad_options_name_the_flag(options):
    with pytest.raises(ValueError, match="--" + next(iter(options)).replace("_", "-")):
        int4.check(make_tiny().config, **int4.apply.__kwdefaults__ | options)


@pytest.mark.parametrize("before", [int4, quantization])
def test_quantized_models_are_refused(before):
    with pytest.raises(ValueError, match=r"no nn\.Linear left"):
        int4.apply(before.apply(tiny(random_weights=True)))
