"""The lean forward pass against transformers' own, its operators against their twins, and the cache with room to grow."""

import copy

import pytest
import torch
from conftest import VOCABULARY, logits_of, make_tiny
from transformers import DynamicCache

import benchmark
import models
from benchmark import new_cache
from fitting import calibration_cache
from inference import generate_ids
from kernels import step
from kernels.build import cpu_variant, load_kernels
from kernels.int8_modules import Int8Linear
from kernels.kv_cache import RoomyCache
from kernels.lean import LeanForward
from optimizations import (
    head_pruning,
    int4,
    kv_cache_quant,
    layer_pruning,
    mixed_precision,
    mlp_pruning,
    quantization,
    smoothing,
)
from optimizations.lean_decode import apply

RECIPES = {
    "float32": lambda model: model,
    "bf16": mixed_precision.apply,
    "int8": quantization.apply,
    "weight_only": lambda model: quantization.apply(model, scheme="weight-only"),
    "classic": lambda model: quantization.apply(model, scheme="classic"),
    "int4": lambda model: int4.apply(with_source(model), rounding="nearest", int8_layers="none", group_size=32),
}


def with_source(model):
    model.source = models.ModelSource("tiny", "random", "tiny")
    return model


@pytest.fixture(params=["kernels", "twins"])
def path(request, monkeypatch):
    """The C++ kernels, or their twins in PyTorch."""
    if request.param == "twins":
        monkeypatch.setenv("TINYOPT_NO_KERNELS", "1")
    elif reason := load_kernels():
        pytest.skip(reason)
    return request.param


@torch.inference_mode()
def walk(model, ids, cache):
    """Logits of a prompt, of six single tokens, of a short draft and of a longer chunk at depth."""
    parts = [logits_of(model, ids[:, :9], cache)]
    parts += [logits_of(model, ids[:, i : i + 1], cache) for i in range(9, 15)]
    parts += [logits_of(model, ids[:, 15:19], cache), logits_of(model, ids[:, 19:], cache)]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("shape", ["grouped", "three_a_group", "multi_head"])
@pytest.mark.parametrize("tied", [True, False])
def test_equals_transformers_own_pass(shape, tied, ids, path):
    model = make_tiny(shape, tied=tied)
    expected = walk(model, ids, DynamicCache(config=model.config))
    lean = apply(model, kv_dtype="float32")
    assert isinstance(lean.forward, LeanForward) and "6 fused products" in lean.notes[-1]
    assert (walk(lean, ids, new_cache(lean)) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("config", [
    {"attention_bias": True, "mlp_bias": True},
    {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 32, "rope_theta": 10000.0}},
])  # fmt: skip
def test_equals_other_llamas(config, ids, path):
    """Biases, which join no products, and other angles."""
    model = make_tiny(**config)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    expected = walk(model, ids, DynamicCache(config=model.config))
    lean = apply(model, kv_dtype="float32")
    assert (walk(lean, ids, new_cache(lean)) - expected).abs().max() < 1e-4


def test_beyond_the_positions_it_is_transformers_own(ids, path):
    """A chunk that ends behind the last angle that was prepared."""
    model = make_tiny(max_position_embeddings=16)
    expected = walk(model, ids, DynamicCache(config=model.config))
    lean = apply(model, kv_dtype="float32")
    assert (walk(lean, ids, new_cache(lean)) - expected).abs().max() < 1e-4


@pytest.mark.parametrize(("recipe", "most"), [("float32", 1e-5), ("weight_only", 1e-4), ("int8", 0.015), ("int4", 0.015)])
def test_a_batch_of_nine_at_depth(recipe, most, path):
    """45 rows at depth 190: the loops for many rows, in a whole layer as one operator, against transformers' own pass. Of
    the inputs that are rounded, among 1,710 tokens before, some fall to the other side."""
    ids = torch.randint(1, VOCABULARY, (9, 195), generator=torch.Generator().manual_seed(3))
    model = RECIPES[recipe](make_tiny("three_a_group"))
    expected = last_five(model, ids, DynamicCache(config=model.config))
    lean = apply(model, kv_dtype="float32")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            difference = (last_five(lean, ids, new_cache(lean)) - expected).abs()
        finally:
            torch.set_num_threads(1)
        assert difference.mean() < most < 0.01 * expected.std()


def last_five(model, ids, cache):
    """Logits of the last five of `ids`, the others fed before."""
    logits_of(model, ids[:, :-5], cache)
    return logits_of(model, ids[:, -5:], cache)


def test_what_is_timed_is_what_a_user_calls(ids, monkeypatch):
    """One greedy sequence never goes to transformers' loop, whatever the recipe."""
    model = make_tiny()
    expected = model.generate(ids[:1], max_new_tokens=9, do_sample=False, attention_mask=torch.ones_like(ids[:1]))
    monkeypatch.setattr(type(model), "generate", None)
    assert torch.equal(generate_ids(model, ids[:1], max_new_tokens=9), expected)


@pytest.mark.parametrize(
    "technique", [head_pruning, mlp_pruning, layer_pruning, smoothing, mixed_precision, quantization, int4]
)
def test_nothing_is_applied_behind_its_back(technique):
    """It holds joined products of its own: what is changed afterwards would not reach them."""
    model = apply(with_source(make_tiny(intermediate_size=256)))
    with pytest.raises(ValueError, match="apply lean_decode last"):
        technique.apply(model)


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_on_top_of_every_recipe(recipe, ids, path):
    """Products that round their inputs may round a tie the other way: few logits move, and not far.

    Classic has one scale for a whole tensor of inputs: without VNNI all logits were seen to move a little with some weights.
    """
    model = RECIPES[recipe](make_tiny("three_a_group"))
    expected = walk(model, ids, DynamicCache(config=model.config))
    before = benchmark.weight_bytes(model), benchmark.count_parameters(model), benchmark.evidence(model)
    lean = apply(model, kv_dtype="float32")
    difference = (walk(lean, ids, new_cache(lean)) - expected).abs()
    # The original's norms and cache round to bfloat16 where there are no kernels.
    upset = recipe == "classic" and path == "kernels" and cpu_variant() in ("avx2", "portable")
    if not upset and (recipe, path) != ("bf16", "twins"):
        assert difference.median() < 1e-3
    assert difference.max() < 0.5
    after = benchmark.weight_bytes(lean), benchmark.count_parameters(lean), benchmark.evidence(lean)
    assert after[:2] == before[:2], "fused products are the same bytes, seen twice"
    assert after[2]["bytes_by_dtype"] == before[2]["bytes_by_dtype"]


def test_pruned_unevenly(ids, path):
    model = head_pruning.apply(make_tiny("three_a_group"), prune_ratio=0.2)
    assert any(hasattr(layer.self_attn, "kv_of_head") for layer in model.model.layers)
    expected = walk(model, ids, DynamicCache(config=model.config))
    lean = apply(model, kv_dtype="float32")
    assert (walk(lean, ids, new_cache(lean)) - expected).abs().max() < 1e-4


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Heads and MLP channels removed where they cost least, no layer like another, and one attention whole."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration_cache, "ROOT", tmp_path_factory.mktemp("calibration"))
        model = with_source(make_tiny("three_a_group", num_hidden_layers=4))
        model.model.layers[2].self_attn.o_proj.weight.data.mul_(0.01)
        model = head_pruning.apply(model, prune_ratio=0.3, method="calibrated")
        model = mlp_pruning.apply(model, prune_ratio=0.2)
        fewer = layer_pruning.apply(copy.deepcopy(model), what="attention", count=1)
    assert len({layer.self_attn.q_proj.out_features for layer in model.model.layers}) > 1
    assert len({layer.mlp.down_proj.in_features for layer in model.model.layers}) > 1
    assert any(hasattr(layer.self_attn, "kv_of_head") for layer in model.model.layers)
    return fewer


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "classic"])  # torch's own, no kernel of ours
@pytest.mark.parametrize("kv8", [False, True])
def test_on_uneven_layers_and_a_layer_without_attention(uneven, recipe, kv8, ids, path):
    """Every precision and cache on the shapes that pruning leaves, against transformers' own pass on the same weights."""
    model = RECIPES[recipe](copy.deepcopy(uneven))
    model = kv_cache_quant.apply(model) if kv8 else model
    expected = walk(model, ids, new_cache(model))
    lean = apply(model, kv_dtype="float32")
    cache = new_cache(lean)
    difference = (walk(lean, ids, cache) - expected).abs()
    assert len(cache.layers) == 3, "a layer without attention owns no part of the cache"
    if recipe == "float32" and not kv8:
        assert difference.max() < 1e-4
    elif not (recipe == "bf16" and path == "twins"):  # the original's norms and cache round to bfloat16 there
        assert difference.median() < (0.02 if kv8 or recipe == "bf16" else 1e-3)
    assert difference.max() < 0.7


def test_int8_cache_is_read_in_place(ids, path):
    model = kv_cache_quant.apply(make_tiny())
    expected = walk(model, ids, new_cache(model))
    lean = apply(model)
    cache = new_cache(lean)
    difference = (walk(lean, ids, cache) - expected).abs()
    assert cache.layers[0].keys.dtype == torch.int8 and difference.mean() < 2e-3


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 4}])
def test_generate_takes_it_too(ids, options, path):
    """What the benchmark times is what `generate` runs: greedy, beams and drafts give transformers' own tokens."""
    model = make_tiny()
    prompt = ids[:1, :12].repeat(1, 2)
    expected = generate_ids(copy.deepcopy(model), prompt, max_new_tokens=12, **options)
    assert torch.equal(generate_ids(apply(model, kv_dtype="float32"), prompt, max_new_tokens=12, **options), expected)


def test_padding_and_foreign_caches_go_to_the_original(ids):
    model = make_tiny()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    expected = model(input_ids=ids, attention_mask=mask).logits
    lean = apply(model)
    lean.forward.logits = None  # whatever takes the lean pass fails
    assert torch.equal(
        lean(input_ids=ids, attention_mask=mask, past_key_values=DynamicCache(config=model.config)).logits, expected
    )
    padded = lean(input_ids=ids, attention_mask=mask, past_key_values=RoomyCache()).logits
    assert (padded - expected)[0, 5:].abs().max() < 0.2 and (padded - expected)[1].abs().max() < 0.2


def test_drafts_are_checked_as_single_tokens_would_be(ids, path):
    """Lossless speculation needs equal logits, not close ones, for few rows and for one."""
    if path == "twins":
        pytest.skip("a GEMM of PyTorch adds in another order for one row")
    for recipe in ("bf16", "int8", "int4"):
        model = apply(RECIPES[recipe](make_tiny()))
        together, alone = new_cache(model), new_cache(model)
        for cache in (together, alone):
            logits_of(model, ids[:1, :8], cache)
        draft = logits_of(model, ids[:1, 8:20], together)
        single = torch.cat([logits_of(model, ids[:1, i : i + 1], alone) for i in range(8, 20)], 1)
        assert torch.equal(draft, single), recipe


def test_refusals():
    with pytest.raises(ValueError, match=r"--kv-dtype int4"):
        apply(make_tiny(), kv_dtype="int4")
    with pytest.raises(ValueError, match="apply lean_decode once"):
        apply(apply(make_tiny()))
    with pytest.raises(ValueError, match="gelu"):
        apply(make_tiny(hidden_act="gelu"))
    with pytest.raises(ValueError, match="dynamic"):
        apply(make_tiny(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}))
    with pytest.raises(ValueError, match="heads of 256, this model's are 272"):
        apply(make_tiny(head_dim=272))


# Operators


def test_norm_and_gate_equal_their_twins(monkeypatch):
    x, update, weight, gate_up = torch.randn(3, 37), torch.randn(3, 37), torch.randn(37), 20 * torch.randn(2, 5, 74)
    halves, whole = gate_up.chunk(2, -1), [part.contiguous() for part in gate_up.chunk(2, -1)]
    fast, slow = x.clone(), x.clone()
    normed, gated = step.add_rms_norm(fast, update, weight, 1e-5), step.silu_mul(*halves)
    assert torch.equal(gated, step.silu_mul(*whole))
    monkeypatch.setenv("TINYOPT_NO_KERNELS", "1")
    torch.testing.assert_close(normed, step.add_rms_norm(slow, update, weight, 1e-5))
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(gated, step.silu_mul(*halves))


def test_room_grows_and_keeps_what_is_there():
    cache, plain = RoomyCache(), []
    for tokens in (5, 1, 1, 40, 2):
        states = torch.randn(2, 3, tokens, 16).bfloat16()
        plain.append(states)
        keys, values = cache.layer(0).update(states, -states)
    assert torch.equal(keys, torch.cat(plain, 2)) and torch.equal(values, -keys)
    layer = cache.layers[0]
    assert cache.get_seq_length() == 49 and layer.keys.shape[2] == 52 and cache.nbytes == 2 * 2 * 3 * 52 * 16 * 2
    cache.crop(-8)
    assert torch.equal(layer.expanded()[0], keys[:, :, :41])


def test_room_known_beforehand_is_never_left():
    """The places that prompt and new tokens take are there from the start, and no more."""
    model, places = apply(make_tiny()), set()
    cache = new_cache(model, room=9)
    for token in torch.arange(9).view(9, 1, 1):
        model(input_ids=token, past_key_values=cache, use_cache=True)
        places |= {layer.keys.data_ptr() for layer in cache.layers}
    assert len(places) == len(cache.layers) and all(layer.keys.shape[2] == 9 for layer in cache.layers)


def test_fused_weights_are_views():
    model = apply(quantization.apply(make_tiny()))
    attention = model.model.layers[0].self_attn
    assert isinstance(attention.q_proj, Int8Linear)
    storages = {attention.get_submodule(name).weight.untyped_storage().data_ptr() for name in ("q_proj", "k_proj", "v_proj")}
    assert len(storages) == 1


def test_operators_keep_their_schemas_and_their_shapes_without_data():
    """What torch.compile relies on: only arguments marked as mutated change, and a fake run gives the real run's shapes."""
    if reason := load_kernels():
        pytest.skip(reason)
    ops, heads, kv_heads, d = torch.ops.tinyopt, 6, 2, 8
    keys = torch.zeros(2, kv_heads, 12, d)
    angles = torch.rand(12, d // 2)
    calls = {
        ops.add_rms_norm: (torch.randn(2, 3, 48), torch.randn(2, 3, 48), torch.ones(48), 1e-5),
        ops.silu_mul: torch.randn(2, 3, 96).chunk(2, -1),
        ops.rope_append: (torch.randn(2, 3, (heads + 2 * kv_heads) * d), angles, angles, keys, keys.clone(), None, None, 4),
        ops.attend: (torch.randn(2, 3, heads, d), keys, keys.clone(), None, None, 7, 0.3),
        ops.attend_prompt: (torch.randn(2, 3, heads, d), keys, keys.clone(), None, None, 7, 0.3),
    }
    for operator, arguments in calls.items():
        torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))
