"""Int8 weights: bytes really fall, quality holds where it should, and kernel and twin tell one story."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import logits_of, make_tiny, share_weights

import benchmark
import quality
from benchmark import new_cache
from devices import Unsupported, require_float64
from kernels.int8 import unpack
from kernels.int8_modules import Int8Linear
from optimizations import head_pruning, int4, kv_cache_quant, mixed_precision
from optimizations.quantization import QuantizedInference, apply

SCHEMES = ["grouped", "dynamic", "weight-only", "classic"]


def closeness(model, reference, ids):
    return torch.cosine_similarity(logits_of(model, ids).flatten(), logits_of(reference, ids).flatten(), dim=0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_stay_close_and_bytes_fall(scheme, tied, ids):
    reference, model = make_tiny(tied=tied), make_tiny(tied=tied)
    apply(model, scheme=scheme, **({} if scheme == "classic" else {"group_size": 32}))
    assert closeness(model, reference, ids) > (0.95 if scheme == "classic" else 0.995)
    limit = 0.75 if scheme == "classic" else 0.40  # tiny layers: scales and padding weigh more than on a real model
    assert benchmark.weight_bytes(model) < limit * benchmark.weight_bytes(reference)
    assert scheme in model.notes[-1] or scheme == "classic"


@pytest.mark.parametrize("scheme", ["grouped", "dynamic", "weight-only"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_network(scheme, tied):
    """However they are packed and padded; a tied table counts once."""
    before = benchmark.count_parameters(make_tiny(tied=tied))
    assert benchmark.count_parameters(apply(make_tiny(tied=tied), scheme=scheme)) == before


@pytest.mark.parametrize("scheme", ["grouped", "dynamic", "weight-only"])
def test_kernel_equals_twin(scheme, ids, monkeypatch):
    """The whole model on the C++ kernels and on pure PyTorch."""
    ids = ids[:, :8]  # more rows, and matrix units round float activations to bfloat16
    with_kernels = logits_of(apply(make_tiny("three_a_group"), scheme=scheme), ids)
    monkeypatch.setenv("TINYOPT_NO_KERNELS", "1")
    twin = apply(make_tiny("three_a_group"), scheme=scheme)
    assert "switched off" in twin.notes[-1]
    difference = (with_kernels - logits_of(twin, ids)).abs()
    assert difference.median() < 1e-4, "an activation on the edge of two integers may fall either way, few do"
    assert difference.max() < 0.2


@pytest.mark.parametrize("tied", [True, False])
def test_the_table_looks_up_what_lm_head_multiplies(tied):
    model = apply(make_tiny(tied=tied), scheme="grouped", group_size=32)
    rows = torch.tensor([[0, 5, 96]])
    looked_up = model.get_input_embeddings()(rows)
    original = make_tiny(tied=tied).get_input_embeddings()(rows)
    assert looked_up.shape == original.shape
    assert (looked_up - original).abs().max() <= original.abs().max() / 127
    if tied:
        assert torch.equal(looked_up[0], model.lm_head.rows(rows[0]))


def test_per_tensor_scale_is_the_originals_formula():
    model = make_tiny()
    weight = model.lm_head.weight.clone()
    apply(model, scheme="weight-only", granularity="tensor")
    scale = unpack(model.lm_head.weight, model.lm_head.scale, 97, 64)[1]
    assert scale.unique().numel() == 1 and torch.equal(scale[0, 0], (weight.abs().max() / 127).bfloat16())


def test_named_layers_keep_float_activations():
    model = apply(make_tiny(), scheme="dynamic", float_activations="down_proj, lm_head")
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, Int8Linear)]
    kept = {name.rpartition(".")[2] for name, m in layers if not m.int8_activations}
    assert kept == {"down_proj", "lm_head"}


def test_fine_layers_have_groups_of_half_the_size():
    """down_proj by default, only where there are groups; and a group stays a multiple of 4."""

    def sizes(model):
        return {name.rpartition(".")[2]: m.group_size for name, m in model.named_modules() if isinstance(m, Int8Linear)}

    default = sizes(apply(make_tiny(), group_size=32))
    assert default.pop("down_proj") == 16 and set(default.values()) == {32}
    assert sizes(apply(make_tiny(), group_size=12, fine_layers="o_proj,lm_head"))["o_proj"] == 4
    assert set(sizes(apply(make_tiny(), group_size=32, fine_layers="")).values()) == {32}
    assert sizes(apply(make_tiny(), scheme="dynamic"))["down_proj"] == 128


@pytest.mark.parametrize(
    "options",
    [
        {"scheme": "int4"},
        {"granularity": "row"},
        {"group_size": 6},
        {"embeddings": "no"},
        {"float_activations": "x"},
        {"fine_layers": "embed"},
        {"smoothing": 0.5, "scheme": "classic"},
        {"granularity": "tensor", "scheme": "classic"},
    ],
)
def test_bad_options_name_the_flag(options):
    with pytest.raises(ValueError, match="--" + next(iter(options)).replace("_", "-")):
        apply(make_tiny(), **options)


def test_one_scale_for_a_whole_tensor(ids):
    """The original's formula, by its flag alone: groups, the default scheme, have scales of their own."""
    model = apply(make_tiny(), granularity="tensor")
    assert logits_of(model, ids).isfinite().all() and "int8 dynamic" in model.notes[-1]
    with pytest.raises(ValueError, match="--granularity tensor"):
        apply(make_tiny(), granularity="tensor", scheme="grouped")


def test_groups_longer_than_a_layer_are_the_whole_layer(ids):
    """A head's width of inputs, say, which is what pruning may leave of o_proj."""
    model, same = apply(make_tiny(), group_size=1024, fine_layers=""), apply(make_tiny(), scheme="dynamic")
    assert torch.equal(logits_of(model, ids), logits_of(same, ids))


def test_twice_is_refused():
    with pytest.raises(ValueError, match=r"no nn\.Linear left"):
        apply(apply(make_tiny()))


@pytest.mark.parametrize("shape", ["grouped", "three_a_group"])
@pytest.mark.parametrize("tied", [True, False])
def test_stack_of_pruning_int8_and_int8_cache(shape, tied, ids):
    """Each step works on what the one before left; decoding in steps equals one pass through the same cache."""
    model = head_pruning.apply(make_tiny(shape, tied=tied))
    kv_cache_quant.apply(apply(model, scheme="weight-only"))
    ids = ids[:, :8]  # more rows, and matrix units round float activations to bfloat16
    whole = logits_of(model, ids, new_cache(model))
    cache = new_cache(model)
    steps = torch.cat([logits_of(model, ids[:, i : i + 1], cache) for i in range(ids.shape[1])], dim=1)
    assert torch.allclose(whole, steps, atol=1e-3)
    assert model.generate(ids, max_new_tokens=4, do_sample=False, past_key_values=new_cache(model)).shape == (2, 12)


@pytest.mark.parametrize("later", [head_pruning, mixed_precision])
def test_wrong_order_is_a_sentence(later):
    with pytest.raises(ValueError, match=r"no nn\.Linear left"):
        later.apply(apply(make_tiny()))


@pytest.mark.embedded
@pytest.mark.parametrize(("scheme", "least"), [("grouped", 0.975), ("weight-only", 0.975), ("dynamic", 0.96)])
def test_quality_of_the_embedded_model(scheme, least, embedded, embedded_reference, monkeypatch):
    """On the beginnings of four windows, smoothed on a little text: two points below what whole ones measure."""
    monkeypatch.setattr(f"{apply.__module__}.CALIBRATION_TOKENS", 2048)
    lengths = {"windows": 97, "nll": 96, "top_ids": 96, "top_log_probs": 96}
    begun = {name: getattr(embedded_reference, name)[:, :length] for name, length in lengths.items()}
    short = dataclasses.replace(embedded_reference, **begun)
    model = apply(share_weights(embedded.model), scheme=scheme)
    assert quality.score_variant(model, short)["perplexity_retention"] > least
    assert benchmark.weight_bytes(model) < 0.30 * 538_060_288


@pytest.mark.embedded
def test_the_class_of_the_original_answers(embedded_loaded_once):
    assert "Paris" in QuantizedInference(model="smollm2-135m").generate("The capital of France is", max_new_tokens=4)


@pytest.mark.parametrize("scheme", [*SCHEMES, "int4", "bf16"])
def test_biases_stay(scheme):
    """Of every layer that has one: it is what comes out where nothing goes in."""
    model, generator = make_tiny(attention_bias=True, mlp_bias=True), torch.Generator().manual_seed(1)
    biases = {name.removesuffix(".bias"): bias for name, bias in model.named_parameters() if name.endswith(".bias")}
    for bias in biases.values():
        bias.data.normal_(generator=generator)
    others = {"int4": (int4.apply, {"rounding": "nearest"}), "bf16": (mixed_precision.apply, {"dtype": "bf16"})}
    quantize, options = others.get(scheme, (apply, {"scheme": scheme}))
    expected = {name: bias.clone() for name, bias in biases.items()}
    model = quantize(model, **options)
    assert len(expected) == 3 * 7
    for name, bias in expected.items():
        layer = model.get_submodule(name)
        for rows in (1, 40):
            torch.testing.assert_close(layer(torch.zeros(rows, layer.in_features)), bias.expand(rows, -1))


def test_other_devices_get_another_scheme_or_a_reason():
    with pytest.raises(Unsupported, match="no kernels for meta"):
        apply(make_tiny().to("meta"), scheme="classic")
    with pytest.raises(Unsupported, match="float64"):
        require_float64(torch.device("mps"))
