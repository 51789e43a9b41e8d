"""Head pruning: what is cut away is exactly what masking would have zeroed, and only cutting makes the model smaller."""

import copy
import shutil

import pytest
import torch
from conftest import logits_of, share_weights, stepwise_logits
from torch import nn
from transformers import DynamicCache, LlamaConfig

import models
from benchmark import count_parameters, evidence, new_cache, weight_bytes
from fitting import calibration_cache, healing, pruning_costs
from inference import generate_ids
from optimizations import head_pruning
from optimizations.head_pruning import apply, check, energies, head_importance, heads_to_keep
from optimizations.kv_cache_quant import Int8Cache

RATIOS = [0.15, 0.25, 0.5]
BY_TEXT = ["energy", "calibrated"]


@pytest.fixture
def random_source(monkeypatch, tmp_path):
    """A source without a tokenizer, whose calibration windows are random ids, and a calibration cache of the test's own."""
    monkeypatch.setattr(calibration_cache, "ROOT", tmp_path / "calibration")
    return models.ModelSource("tiny", "random", "")


def with_source(model, source):
    model.source = source
    return model


def pruned_and_masked(model, ratio):
    return apply(copy.deepcopy(model), prune_ratio=ratio), apply(copy.deepcopy(model), prune_ratio=ratio, mode="mask")


def attentions(model):
    return [layer.self_attn for layer in model.model.layers]


def make_small(model, heads):
    """Shrink what `heads` of every layer write, so that these are the least important."""
    for attention in attentions(model):
        attention.o_proj.weight.data.view(attention.o_proj.out_features, -1, attention.head_dim)[:, heads] *= 1e-3


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("ratio", RATIOS)
def test_structural_equals_masked(any_tiny, ids, ratio):
    """Removing a head and zeroing its output are the same function, in one pass and token by token through the cache,
    with even groups, with an explicit map and where KV heads vanish."""
    pruned, masked = pruned_and_masked(any_tiny, ratio)
    expected = logits_of(masked, ids)
    assert_close(logits_of(pruned, ids), expected)
    assert_close(logits_of(pruned, ids, new_cache(pruned)), expected)
    assert_close(stepwise_logits(pruned, ids, new_cache(pruned)), expected)
    assert (logits_of(any_tiny, ids) - expected).abs().max() > 0.01, "pruning changed nothing: the test shows nothing"


@pytest.mark.parametrize("ratio", RATIOS)
def test_chunks_through_the_cache(any_tiny, ids, ratio):
    """A chunk of several tokens after others are cached needs a real mask: causal within, everything before."""
    pruned, masked = pruned_and_masked(any_tiny, ratio)
    cache = new_cache(pruned)
    chunks = [logits_of(pruned, ids[:, start : start + 7], cache) for start in range(0, ids.shape[1], 7)]
    assert_close(torch.cat(chunks, dim=1), logits_of(masked, ids))


def test_explicit_map_is_kept_for_uneven_groups(tiny, ids):
    """9 heads in groups of 3, one removed: one KV head has two readers, the others three."""
    model = tiny("three_a_group")
    make_small(model, [4])
    pruned, masked = pruned_and_masked(model, 0.15)
    for attention in attentions(pruned):
        assert attention.kv_of_head.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert_close(stepwise_logits(pruned, ids, new_cache(pruned)), logits_of(masked, ids))


def test_kv_heads_that_nobody_reads_vanish(tiny, ids):
    """All readers of KV head 0 and one of KV head 2 go: the cache shrinks by a third, and the map counts what is left."""
    model = tiny("three_a_group")
    make_small(model, [0, 1, 2, 7])
    pruned, masked = pruned_and_masked(model, 0.4)
    for attention in attentions(pruned):
        assert attention.k_proj.out_features == attention.v_proj.out_features == 2 * 16
        assert attention.kv_of_head.tolist() == [0, 0, 0, 1, 1]
    cache, full = new_cache(pruned), new_cache(model)
    assert_close(stepwise_logits(pruned, ids, cache), logits_of(masked, ids))
    logits_of(model, ids, full)
    assert cache.layers[0].keys.shape[1] == 2 and full.layers[0].keys.shape[1] == 3


def test_whole_groups_vanish_without_a_map(tiny, ids):
    """8 heads in groups of 2, both readers of one KV head removed: three even groups, so no map is needed."""
    model = tiny("grouped", num_key_value_heads=4)
    make_small(model, [2, 3])
    pruned, masked = pruned_and_masked(model, 0.25)
    for attention in attentions(pruned):
        assert attention.k_proj.out_features == 3 * 16 and attention.num_key_value_groups == 2
        assert getattr(attention, "kv_of_head", None) is None
    assert_close(stepwise_logits(pruned, ids, new_cache(pruned)), logits_of(masked, ids))


def test_layers_may_differ(tiny, ids):
    """One layer loses a whole KV head, the next only readers: each has its own map and its own cache width."""
    model = tiny("three_a_group")
    for heads, attention in zip(([0, 1, 2], [0, 3, 6], [4, 5, 8]), attentions(model), strict=True):
        attention.o_proj.weight.data.view(144, 9, 16)[:, heads] *= 1e-3
    pruned, masked = pruned_and_masked(model, 0.4)
    widths = [attention.k_proj.out_features // 16 for attention in attentions(pruned)]
    assert widths[0] == 2 and widths[1] == 3
    assert_close(stepwise_logits(pruned, ids, new_cache(pruned)), logits_of(masked, ids))


@pytest.mark.parametrize("shape", ["grouped", "three_a_group", "multi_head"])
def test_left_padded_batch(tiny, shape):
    """Padding is masked out by the pruned model's own attention: a padded row ends as it does alone."""
    pruned = apply(tiny(shape), prune_ratio=0.15)
    short, long = torch.tensor([[11, 12, 13]]), torch.tensor([[21, 22, 23, 24, 25, 26]])
    batch = torch.cat([torch.cat([torch.zeros(1, 3, dtype=torch.long), short], 1), long])
    mask = (batch != 0).long()
    output = pruned.generate(batch, attention_mask=mask, max_new_tokens=8, do_sample=False)
    for row, alone in zip(output, (short, long), strict=True):
        assert row[-8:].tolist() == generate_ids(pruned, alone, max_new_tokens=8)[0, -8:].tolist()


@pytest.mark.parametrize("ratio", RATIOS)
def test_map_survives_generate(any_tiny, ids, ratio):
    """`generate` neither resets the attention function nor loses the map: same tokens as the masked model, and the map
    is what it was."""
    pruned, masked = pruned_and_masked(any_tiny, ratio)
    before = [getattr(attention, "kv_of_head", None) for attention in attentions(pruned)]
    expected = generate_ids(masked, ids[:, :8], max_new_tokens=16)
    for _ in range(2):
        assert torch.equal(generate_ids(pruned, ids[:, :8], max_new_tokens=16), expected)
    after = [getattr(attention, "kv_of_head", None) for attention in attentions(pruned)]
    assert all(b is a for b, a in zip(before, after, strict=True))
    beams = generate_ids(pruned, ids[:, :8], max_new_tokens=8, num_beams=3)
    assert torch.equal(beams, generate_ids(masked, ids[:, :8], max_new_tokens=8, num_beams=3))


@pytest.mark.parametrize("ratio", RATIOS)
def test_structural_removes_what_it_says(any_tiny, ratio):
    """Parameters and bytes fall by exactly the removed rows and columns; the benchmark sees fewer heads."""
    model = any_tiny
    pruned = apply(copy.deepcopy(model), prune_ratio=ratio)
    width, head_dim, layers = model.config.hidden_size, model.config.head_dim, len(attentions(model))
    query_gone = evidence(model)["query_heads"] - evidence(pruned)["query_heads"]
    kv_gone = evidence(model)["kv_heads"] - evidence(pruned)["kv_heads"]
    assert query_gone >= layers
    fewer = 2 * (query_gone + kv_gone) * head_dim * width  # q and o per query head, k and v per KV head
    assert count_parameters(model) - count_parameters(pruned) == fewer
    maps = sum(attention.kv_of_head.nbytes for attention in attentions(pruned) if hasattr(attention, "kv_of_head"))
    assert weight_bytes(model) - weight_bytes(pruned) == 4 * fewer - maps
    assert f"removed {query_gone} of" in pruned.notes[-1]


@pytest.mark.parametrize("ratio", RATIOS)
def test_mask_removes_nothing(any_tiny, ratio):
    """The original's zeroing: same parameters, same bytes, same heads."""
    masked = apply(copy.deepcopy(any_tiny), prune_ratio=ratio, mode="mask")
    assert count_parameters(masked) == count_parameters(any_tiny)
    assert weight_bytes(masked) == weight_bytes(any_tiny)
    assert evidence(masked)["query_heads"] == evidence(any_tiny)["query_heads"]
    assert "zeroed" in masked.notes[-1]


@pytest.mark.parametrize("mode", ["structural", "mask"])
@pytest.mark.parametrize("ratio", RATIOS)
def test_removed_share_is_near_the_ratio(any_tiny, mode, ratio):
    """Of each layer's heads the nearest whole number to the share asked for, or five points from it at most."""
    heads = any_tiny.config.num_attention_heads
    apply(any_tiny, prune_ratio=ratio, mode=mode)
    for attention in attentions(any_tiny):
        norms = head_importance(attention)
        gone = heads - int((norms > 0).sum())
        assert abs(gone / heads - ratio) <= max(0.05, 0.5 / heads) + 1e-9


def test_importance_is_the_norm_of_a_heads_output_columns(tiny):
    """Head h of o_proj is columns h*d to (h+1)*d; its norm by hand, sum of squares and a root."""
    attention = tiny("three_a_group").model.layers[1].self_attn
    weight = attention.o_proj.weight.tolist()
    by_hand = [sum(value * value for row in weight for value in row[head * 16 : (head + 1) * 16]) ** 0.5 for head in range(9)]
    assert head_importance(attention).tolist() == pytest.approx(by_hand, rel=1e-5)


def test_the_least_important_heads_go(tiny):
    """Structural pruning keeps the weights of exactly the heads with the largest norms, unchanged and in order."""
    model = tiny("multi_head")
    pruned = apply(copy.deepcopy(model), prune_ratio=0.25)
    for before, after in zip(attentions(model), attentions(pruned), strict=True):
        kept = [head for head in range(4) if head != int(head_importance(before).argmin())]
        rows = [row for head in kept for row in range(head * 16, head * 16 + 16)]
        assert torch.equal(after.q_proj.weight, before.q_proj.weight[rows])
        assert torch.equal(after.o_proj.weight, before.o_proj.weight[:, rows])


def test_removal_is_even_in_every_group():
    """TinyLlama's 32 heads on 4 KV heads at 25 %: two of each group of eight, though one group holds the eight smallest."""
    importance = torch.arange(32, dtype=torch.float32)
    kept = heads_to_keep(importance, kv_heads=4, prune_ratio=0.25)
    assert len(kept) == 24 and kept == sorted(kept)
    assert [sum(head // 8 == group for head in kept) for group in range(4)] == [6, 6, 6, 6]
    assert set(range(32)) - set(kept) == {0, 1, 8, 9, 16, 17, 24, 25}


def test_uneven_removal_takes_the_smallest_of_all():
    """15 % of 32 is five heads, which no four groups share evenly within five points: the five smallest of the layer."""
    kept = heads_to_keep(torch.arange(32, dtype=torch.float32), kv_heads=2, prune_ratio=0.22)
    assert len(kept) in (24, 25)
    kept = heads_to_keep(torch.arange(9, dtype=torch.float32), kv_heads=3, prune_ratio=0.22)
    assert kept == [2, 3, 4, 5, 6, 7, 8]


# Methods that read calibration text


@pytest.mark.parametrize("method", BY_TEXT)
@pytest.mark.parametrize("ratio", [0.15, 0.5])
def test_structural_equals_masked_by_text(any_tiny, ids, random_source, ratio, method):
    """The same heads go and the same weights are refitted, whether columns are cut or zeroed; other caches agree too."""
    options = {"prune_ratio": ratio, "method": method}
    model = with_source(any_tiny, random_source)
    masked = apply(copy.deepcopy(model), mode="mask", **options)
    pruned = apply(copy.deepcopy(model), **options)
    expected = logits_of(masked, ids)
    assert_close(logits_of(pruned, ids), expected)
    assert_close(stepwise_logits(pruned, ids, new_cache(pruned)), expected)
    assert (stepwise_logits(pruned, ids, Int8Cache()) - expected).abs().max() < 0.5
    tokens = generate_ids(masked, ids[:, :8], max_new_tokens=6)
    assert torch.equal(generate_ids(pruned, ids[:, :8], max_new_tokens=6), tokens)
    gone = evidence(model)["query_heads"] - evidence(pruned)["query_heads"]
    if method == "calibrated":
        assert gone == round(ratio * evidence(model)["query_heads"])
    assert f"removed {gone} of" in pruned.notes[-1] and method in pruned.notes[-1]


def test_energy_is_the_mean_square_of_what_a_head_writes(tiny, random_source, monkeypatch):
    """By hand: each head's columns of o_proj times its inputs, squared, averaged over tokens."""
    model = with_source(tiny("three_a_group"), random_source)
    monkeypatch.setattr(head_pruning, "ENERGY_WINDOWS", 1)
    seen = []
    attention = model.model.layers[1].self_attn
    handle = attention.o_proj.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0][0]))
    actual = energies(model, head_pruning.calibration.refit_windows(model))[1]
    handle.remove()
    w = attention.o_proj.weight
    by_hand = [(seen[0][:, h * 16 : h * 16 + 16] @ w[:, h * 16 : h * 16 + 16].T).square().sum(1).mean() for h in range(9)]
    torch.testing.assert_close(actual, torch.stack(by_hand), rtol=1e-3, atol=1e-5)


def test_calibrated_refit_beats_plain_removal(tiny, ids, random_source):
    """Nearer to the dense model than removing the same number of heads by norm, on ids that were not calibrated on."""
    model = with_source(tiny("three_a_group"), random_source)
    dense = logits_of(model, ids)
    by_norm = logits_of(apply(copy.deepcopy(model), prune_ratio=0.33), ids)
    calibrated = logits_of(apply(copy.deepcopy(model), prune_ratio=0.33, method="calibrated"), ids)
    assert (calibrated - dense).square().mean() < 0.9 * (by_norm - dense).square().mean()


def test_calibration_is_kept_and_resumed(tiny, ids, random_source, monkeypatch, tmp_path):
    """The second run reads no text; a run that lost some layers' files computes those again, to the same weights."""
    model = with_source(tiny("three_a_group"), random_source)
    expected = logits_of(apply(copy.deepcopy(model), method="calibrated"), ids)
    files = sorted((tmp_path / "calibration").glob("*/*"))
    layers = [f"layer-00{index}.safetensors" for index in range(3)]
    assert sorted(file.name for file in files) == [*layers, "local.json", "measured.json", "taken.json"]
    next(file for file in files if file.name == "layer-001.safetensors").write_bytes(b"broken")
    assert_close(logits_of(apply(copy.deepcopy(model), method="calibrated"), ids), expected)
    monkeypatch.setattr(type(model.model.embed_tokens), "forward", None)
    again = apply(copy.deepcopy(model), method="calibrated")
    monkeypatch.undo()
    assert torch.equal(logits_of(again, ids), expected)


def test_ranking_goes_on_where_it_was_stopped(tiny, random_source, monkeypatch, tmp_path):
    """Ctrl-C while the second layer is measured: the next run takes no gradients, measures two layers and ranks alike."""
    expected = apply(with_source(tiny("three_a_group"), random_source), method="calibrated").state_dict()
    shutil.rmtree(tmp_path / "calibration")
    whole, asked = pruning_costs._divergences_without, []

    def stop_at_the_second(*arguments, **options):
        asked.append(arguments[4])
        if len(asked) == 2:
            raise KeyboardInterrupt
        return whole(*arguments, **options)

    monkeypatch.setattr(pruning_costs, "_divergences_without", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        apply(model := with_source(tiny("three_a_group"), random_source), method="calibrated")
    monkeypatch.setattr(pruning_costs, "moments", None)
    resumed = apply(model, method="calibrated").state_dict()
    assert asked == [0, 1, 1, 2] and resumed.keys() == expected.keys()
    assert all(torch.allclose(resumed[name], weight, atol=1e-5) for name, weight in expected.items())


def test_kv_heads_that_nobody_reads_vanish_when_calibrated(tiny, ids, random_source):
    """Heads that write nothing go first: with all readers of one KV head among them, the cache shrinks."""
    model = with_source(tiny("three_a_group"), random_source)
    for attention in attentions(model):
        attention.o_proj.weight.data.view(144, 9, 16)[:, [0, 1, 2]] = 0
    dense = logits_of(model, ids)
    pruned = apply(copy.deepcopy(model), prune_ratio=0.333, method="calibrated")
    assert evidence(pruned)["kv_heads"] == 6 and evidence(pruned)["query_heads"] == 18
    cache = new_cache(pruned)
    actual = stepwise_logits(pruned, ids, cache)
    assert cache.layers[0].keys.shape[1] == 2
    assert (actual - dense).abs().max() < 1, "nothing was lost, and refitting on other ids costs little"


def test_healing_comes_nearer_to_the_dense_model(tiny, random_source, monkeypatch):
    """A few seconds of training: shapes and modules as pruning left them, plain nn.Linear, nothing left to train."""
    model = with_source(tiny("three_a_group"), random_source)
    pruned = apply(copy.deepcopy(model), prune_ratio=0.33)
    healed = apply(copy.deepcopy(model), prune_ratio=0.33, heal_minutes=0.03)
    assert [(n, p.shape) for n, p in healed.named_parameters()] == [(n, p.shape) for n, p in pruned.named_parameters()]
    assert not any(parameter.requires_grad for parameter in healed.parameters())
    before, after = (float(word) for word in healed.notes[-1].split("about ")[1].split(" nats")[0].split(" -> "))
    assert after < before and "healed in" in healed.notes[-1]
    saved = calibration_cache.CalibrationCache.saved
    monkeypatch.setattr(healing.Teacher, "_ask", None)
    again = apply(copy.deepcopy(model), prune_ratio=0.33, heal_minutes=0.03)  # what was learnt is kept, and what the model said
    assert again.notes == healed.notes and calibration_cache.CalibrationCache.saved == saved > 0
    assert all(torch.equal(*pair) for pair in zip(again.parameters(), healed.parameters(), strict=True))


# What is refused


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"method": "random"}, "--method random.*l2, energy, calibrated"),
        ({"mode": "remove"}, "--mode remove.*structural or mask"),
        ({"heal_minutes": -1}, "--heal-minutes -1"),
        ({"heal_minutes": float("nan")}, "--heal-minutes nan"),
        ({"heal_minutes": 1, "mode": "mask"}, "--heal-minutes.*structural"),
        ({"prune_ratio": 0.001, "method": "calibrated"}, "--prune-ratio 0.001.*no head at all"),
        ({"prune_ratio": 0.95, "method": "calibrated"}, "--prune-ratio 0.95.*no head"),
        ({"prune_ratio": 1.5, "method": "calibrated"}, "--prune-ratio 1.5.*between 0 and 1"),
    ],
)
def test_bad_options_are_refused_before_weights(any_tiny, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        check(any_tiny.config, **apply.__kwdefaults__ | options)
    with pytest.raises(ValueError, match=sentence):
        apply(any_tiny, **options)


@pytest.mark.parametrize("ratio", [0, 1, 0.0, 1.0, -0.1, 1.5, float("nan")])
def test_ratio_out_of_range(tiny, ratio):
    with pytest.raises(ValueError, match=r"--prune-ratio.*between 0 and 1"):
        apply(tiny(), prune_ratio=ratio)


@pytest.mark.parametrize(("ratio", "sentence"), [(0.99, "leaves no head"), (0.01, "no head at all")])
@pytest.mark.parametrize("mode", ["structural", "mask"])
def test_ratio_that_leaves_or_removes_nothing(any_tiny, ratio, sentence, mode):
    """Said by `apply` and, before weights are loaded, by `check`; nothing has been changed when it is."""
    before = {name: values.clone() for name, values in any_tiny.state_dict().items()}
    with pytest.raises(ValueError, match=f"--prune-ratio {ratio}.*{sentence}"):
        apply(any_tiny, prune_ratio=ratio, mode=mode)
    assert all(torch.equal(values, before[name]) for name, values in any_tiny.state_dict().items())
    with pytest.raises(ValueError, match=f"--prune-ratio {ratio}.*{sentence}"):
        check(any_tiny.config, **apply.__kwdefaults__ | {"prune_ratio": ratio, "mode": mode})


def test_ratio_suggested_by_the_error_works(any_tiny):
    """The sentence names the bound above which a head goes and the one below which one stays: both hold."""
    heads = any_tiny.config.num_attention_heads
    for bad, step in ((0.01, 0.001), (0.99, -0.001)):
        with pytest.raises(ValueError) as error:
            check(any_tiny.config, **apply.__kwdefaults__ | {"prune_ratio": bad})
        assert ("more than" if step > 0 else "less than") in str(error.value)
        suggested = float(str(error.value).split()[-1])
        kept = heads_to_keep(torch.rand(heads), kv_heads=any_tiny.config.num_key_value_heads, prune_ratio=suggested + step)
        assert 0 < len(kept) < heads


def test_quantised_model(tiny):
    """After another technique has replaced the linear layers there is nothing to cut: the sentence gives the order."""

    class Packed(nn.Linear):
        """Stands for any technique's own layer: not a plain nn.Linear any more."""

    model = tiny()
    for attention in attentions(model):
        attention.o_proj = Packed(128, 64, bias=False)
    with pytest.raises(ValueError, match="run head_pruning before"):
        apply(model)


def test_check_knows_the_real_models():
    """Both models of the README accept the default ratio."""
    check(LlamaConfig(hidden_size=2048, num_attention_heads=32, num_key_value_heads=4), **apply.__kwdefaults__)
    check(LlamaConfig(hidden_size=576, num_attention_heads=9, num_key_value_heads=3), **apply.__kwdefaults__)


@pytest.mark.parametrize("second", ["structural", "mask"])
def test_a_second_pruning_is_refused(tiny, second):
    """After an uneven first one heads no longer fall into equal groups: it must not read wrong KV heads in silence."""
    model = tiny("three_a_group")
    make_small(model, [4])
    once = apply(model, prune_ratio=0.15)
    with pytest.raises(ValueError, match="apply head_pruning once"):
        apply(once, prune_ratio=0.25, mode=second)


def test_default_cache_is_transformers_own(tiny):
    """Pruning sets no cache of its own: combinations with an int8 cache depend on it."""
    assert isinstance(new_cache(apply(tiny())), DynamicCache)


@pytest.mark.parametrize("ratio", RATIOS)
def test_on_an_accelerator(any_tiny, ids, accelerator, ratio):
    """Pruned on the device it will run on, as the benchmark does: the same heads go as on the CPU."""
    expected = logits_of(apply(copy.deepcopy(any_tiny), prune_ratio=ratio), ids)
    pruned = apply(any_tiny.to(accelerator), prune_ratio=ratio)
    actual = stepwise_logits(pruned, ids.to(accelerator), new_cache(pruned)).cpu()
    torch.testing.assert_close(actual, expected, atol=1e-2, rtol=0)


@pytest.mark.embedded
def test_embedded_model_pruned(embedded):
    """The real model's 9/3 heads: structural and masked agree on text. L2 pruning hurts it, but it still runs."""
    encoded = embedded.tokenizer("The capital of France is Paris, and the capital of Italy is", return_tensors="pt").input_ids
    masked = share_weights(embedded.model)
    for attention in attentions(masked):  # masking writes into this one
        attention.o_proj.weight = nn.Parameter(attention.o_proj.weight.clone(), requires_grad=False)
    apply(masked, prune_ratio=0.25, mode="mask")
    pruned = apply(embedded.model, prune_ratio=0.25)
    assert evidence(pruned)["query_heads"] == 30 * 7

    def exactly(model):  # float32 leaves some 1e-3 of logits up to 40, which is its own, not pruning's
        return logits_of(copy.deepcopy(model).double(), encoded)

    torch.testing.assert_close(exactly(pruned), exactly(masked), atol=1e-4, rtol=0)


@pytest.mark.embedded
def test_the_small_class(embedded_loaded_once):
    """`PrunedInference(prune_ratio=...)` loads, prunes, answers in words."""
    inference = head_pruning.PrunedInference("smollm2-135m", device="cpu", prune_ratio=0.15)
    assert evidence(inference.model)["query_heads"] == 30 * 8
    assert isinstance(inference.generate("The capital of France is", max_new_tokens=3), str)
