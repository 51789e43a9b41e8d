"""The int8 KV cache: how exact it is, how small it is, and that everything transformers does with a cache works."""

import copy

import pytest
import torch
from conftest import logits_of, stepwise_logits
from transformers import AttentionInterface, DynamicCache, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import quality
from benchmark import cache_bytes, new_cache
from inference import generate_ids
from kernels.int8 import quantize_groups
from optimizations import kv_cache_quant
from optimizations.kv_cache_quant import Int8Cache, apply, quantize_tokens


@pytest.fixture
def int8(any_tiny):
    return apply(any_tiny)


def dequantize(states):
    quantized, scales = quantize_tokens(states)
    return quantized.float() * scales


def assert_same_but_for_ties(actual, expected):
    """Equal but where a key on a rounding boundary fell to either side. Int8 itself moves these logits by 0.01 to 0.03 on
    average, so a scale taken over other tokens would show."""
    assert (actual - expected).abs().mean() < 0.002


# Rounding


@pytest.mark.parametrize("magnitude", [1e-30, 1e-4, 1.0, 1e4, 1e30])
def test_error_is_at_most_half_a_step(magnitude):
    """Each number comes back within half of its row's step, absmax / 127, at any magnitude."""
    states = torch.randn(2, 3, 50, 64, generator=torch.Generator().manual_seed(0)) * magnitude
    quantized, scales = quantize_tokens(states)
    assert all(torch.equal(*pair) for pair in zip((quantized, scales), quantize_groups(states, 64), strict=True))
    assert quantized.dtype == torch.int8 and scales.shape == (2, 3, 50, 1)
    step = states.abs().amax(-1, keepdim=True) / 127
    assert ((quantized.float() * scales - states).abs() <= step * 0.5001).all()
    assert quantized.abs().amax(-1).eq(127).all(), "each row must use the whole range"


def test_each_token_and_head_has_its_own_scale():
    """A loud token or head does not coarsen a quiet one."""
    states = torch.ones(1, 2, 3, 8)
    states[0, 1] *= 1000
    states[0, 0, 2] *= 0.001
    torch.testing.assert_close(dequantize(states), states, rtol=1e-6, atol=0)


def test_zeros_stay_zeros():
    """A row of nothing has no scale to divide by: it comes back as zeros, not as NaN."""
    states = torch.zeros(1, 2, 3, 16)
    states[0, 0, 0, 0] = 5
    assert torch.equal(dequantize(states), states)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_values(dtype):
    """Numbers near the largest and the smallest of each dtype stay finite and within half a step of their row."""
    info = torch.finfo(dtype)
    large = torch.tensor([0.99 * info.max, -0.99 * info.max, info.max / 2, 1.0, info.tiny, 0.0], dtype=dtype)
    small = torch.tensor([256 * info.tiny, -256 * info.tiny, 100 * info.tiny, 0.0], dtype=dtype)
    for row in (large.view(1, 1, 1, 6), small.view(1, 1, 1, 4)):
        back = dequantize(row)
        assert back.isfinite().all()
        step = row.float().abs().max() / 127
        assert ((back - row.float()).abs() <= 0.51 * step).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(bad):
    """int8 has no NaN: the scale must carry it, or a broken model would look sound and the benchmark's check be blind."""
    states = torch.ones(1, 1, 2, 8)
    states[0, 0, 1, 3] = bad
    back = dequantize(states)
    assert back[0, 0, 0].isfinite().all() and not back[0, 0, 1].isfinite().all()


# What is stored


def test_only_int8_and_scales_are_kept(int8, ids):
    """After prefill and decode no layer holds a floating-point tensor but the scales, one number a token and head."""
    cache = new_cache(int8)
    logits_of(int8, ids, cache)
    logits_of(int8, ids[:, :1], cache)
    heads = int8.config.num_key_value_heads
    for layer in cache.layers:
        tensors = {name: value for name, value in vars(layer).items() if isinstance(value, torch.Tensor)}
        assert set(tensors) == {"keys", "values", "key_scales", "value_scales"}
        for name, tensor in tensors.items():
            assert tensor.dtype == (torch.float32 if name.endswith("scales") else torch.int8)
            assert tensor.shape == ((2, heads, 28) if name.endswith("scales") else (2, heads, 28, 16)), "25 tokens and room"
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, "a view would keep more alive than is counted"


@pytest.mark.parametrize(("dtype", "saving"), [(torch.bfloat16, 0.45), (torch.float32, 0.70)])
def test_bytes_against_a_default_cache(tiny, ids, dtype, saving):
    """With heads of 64, as both real models have: 68 bytes a row instead of 128 in bf16 or 256 in float32, measured on
    the tensors of both caches."""
    model = tiny("grouped", head_dim=64).to(dtype)
    default, small = DynamicCache(config=model.config), new_cache(apply(model))
    for cache in (default, small):
        logits_of(model, ids, cache)
    full = sum(t.untyped_storage().nbytes() for layer in default.layers for t in (layer.keys, layer.values))
    assert cache_bytes(default) == full == 2 * 24 * 2 * 64 * 2 * 3 * dtype.itemsize
    held = sum(
        t.untyped_storage().nbytes() for layer in small.layers for t in vars(layer).values() if isinstance(t, torch.Tensor)
    )
    assert cache_bytes(small) == small.nbytes == held
    assert 1 - held / full >= saving


def test_bytes_while_it_grows(tiny):
    """Without being told how long a text becomes, too: room to grow is little beside what int8 saves."""
    model = apply(tiny("grouped", head_dim=64))
    cache, width = new_cache(model), model.config.num_hidden_layers * 2 * model.config.num_key_value_heads * 64
    with torch.inference_mode():
        logits_of(model, torch.ones(1, 30, dtype=torch.long), cache)
        for tokens in range(31, 200):
            logits_of(model, torch.ones(1, 1, dtype=torch.long), cache)
            assert cache.nbytes <= 0.6 * tokens * width * 2, f"{tokens} tokens in bf16"
    told = generate_ids(model, torch.ones(2, 30, dtype=torch.long), max_new_tokens=51, return_dict_in_generate=True)
    assert told.past_key_values.nbytes == 2 * 81 * model.config.num_hidden_layers * 2 * 2 * (64 + 4)


def test_an_empty_cache_holds_nothing(int8):
    cache = new_cache(int8)
    assert cache.nbytes == 0 and cache.get_seq_length() == 0


# What attention sees


def test_attention_sees_stored_values_from_the_first_token(tiny, ids):
    """On the very first forward, before anything was read back, keys and values are already what int8 made of them:
    quantising them again changes nothing. A cache that hands exact values on at first hides its damage."""
    seen = []

    def spy(module, query, key, value, attention_mask, **kwargs):
        seen.append((key, value))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("spy", spy)
    AttentionMaskInterface.register("spy", sdpa_mask)
    model = apply(tiny())
    model.set_attn_implementation("spy")
    cache = new_cache(model)
    logits_of(model, ids[:, :16], cache)
    logits_of(model, ids[:, 16:], cache)
    assert len(seen) == 6
    for states in (tensor for pair in seen for tensor in pair):
        torch.testing.assert_close(dequantize(states), states, rtol=1e-6, atol=0)
    for (key, _), layer in zip(seen[3:], cache.layers, strict=True):
        stored = layer.keys.float() * layer.key_scales[..., None]
        torch.testing.assert_close(key, stored[:, :, :24], rtol=1e-6, atol=0)
    seen.clear()
    logits_of(model, ids, DynamicCache(config=model.config))
    assert not torch.allclose(dequantize(seen[0][0]), seen[0][0], rtol=1e-6, atol=0), "the check must tell exact values"


def test_one_pass_shows_the_damage(int8, ids):
    """Prefill in a single forward already differs from the exact cache: a little, but not nothing."""
    exact = logits_of(int8, ids, DynamicCache(config=int8.config))
    quantised = logits_of(int8, ids, new_cache(int8))
    difference = (quantised - exact).abs().max()
    assert 1e-4 < difference < 0.1 * exact.abs().max()


def test_chunks_and_steps_equal_one_pass(int8, ids):
    """What is stored does not depend on how the tokens arrived: whole, in chunks, or one at a time."""
    whole = logits_of(int8, ids, new_cache(int8))
    cache = new_cache(int8)
    chunks = torch.cat([logits_of(int8, ids[:, start : start + 7], cache) for start in range(0, 24, 7)], dim=1)
    assert_same_but_for_ties(chunks, whole)
    assert_same_but_for_ties(stepwise_logits(int8, ids, new_cache(int8)), whole)


# generate()


def test_greedy(int8, ids):
    """`generate` gives the tokens that feeding them one at a time through the cache gives."""
    output = generate_ids(int8, ids[:, :8], max_new_tokens=12)
    cache, fed = new_cache(int8), ids[:, :8]
    by_hand = []
    for _ in range(12):
        fed = logits_of(int8, fed, cache)[:, -1].argmax(-1, keepdim=True)
        by_hand.append(fed)
    assert torch.equal(output[:, 8:], torch.cat(by_hand, dim=1))


def test_sampling_is_reproducible(int8, ids):
    """The same seed gives the same sample, another seed another."""

    def sample(seed):
        torch.manual_seed(seed)
        return generate_ids(int8, ids[:, :8], max_new_tokens=12, do_sample=True, temperature=1.0, top_k=0)

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))


def test_beam_search(int8, ids):
    """Beams copy and reorder the cache: what is scored at the end equals scoring the winner afresh."""
    prompt = ids[:1, :8]
    output = int8.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, num_beams=3, do_sample=False,
        past_key_values=new_cache(int8), return_dict_in_generate=True, output_scores=True, length_penalty=0.0,
    )  # fmt: skip
    winner = output.sequences
    log_probs = logits_of(int8, winner, new_cache(int8)).log_softmax(-1)[0, 7:-1]
    afresh = log_probs.gather(1, winner[0, 8:, None]).sum()
    assert output.sequences_scores[0].item() == pytest.approx(afresh.item(), abs=0.02)


def test_prompt_lookup(int8, ids):
    """Rejected drafts are cut off the cache again: the tokens are those of plain greedy decoding."""
    prompt = ids[:1, :6].repeat(1, 3)  # repeats, so that there is something to look up
    greedy = generate_ids(int8, prompt, max_new_tokens=20)
    assert torch.equal(generate_ids(int8, prompt, max_new_tokens=20, prompt_lookup_num_tokens=3), greedy)


def test_plain_generate_takes_the_cache(int8):
    """What a user types who knows transformers alone must not fall back to a cache in floating point, nor override his wish."""
    prompt = torch.tensor([[11, 12, 13]])
    options = {"max_new_tokens": 10, "do_sample": False, "return_dict_in_generate": True}
    output = int8.generate(prompt, **options)
    assert type(output.past_key_values) is type(new_cache(int8)) and output.past_key_values.nbytes > 0
    assert torch.equal(output.sequences, generate_ids(int8, prompt, max_new_tokens=10))
    assert output.past_key_values.get_seq_length() == int8.generate(prompt, **options).past_key_values.get_seq_length() == 12
    assert isinstance(int8.generate(prompt, cache_implementation="static", **options).past_key_values, StaticCache)


def test_left_padded_batch(int8):
    """Each row of a padded batch gives the tokens it gives alone: padding neither reads nor scales with the others."""
    rows = [torch.tensor([[11, 12, 13]]), torch.tensor([[21, 22, 23, 24, 25, 26]]), torch.tensor([[31, 32, 33, 34]])]
    batch = torch.cat([torch.nn.functional.pad(row, (6 - row.shape[1], 0)) for row in rows])
    output = int8.generate(
        batch, attention_mask=(batch != 0).long(), max_new_tokens=10, do_sample=False, past_key_values=new_cache(int8)
    )
    for together, alone in zip(output, rows, strict=True):
        assert together[-10:].tolist() == generate_ids(int8, alone, max_new_tokens=10)[0, -10:].tolist()


def test_crop(int8, ids):
    """Twenty-four tokens less four are the first twenty; going on from there is going on from twenty."""
    cropped, short = new_cache(int8), new_cache(int8)
    logits_of(int8, ids, cropped)
    cropped.crop(-4)
    logits_of(int8, ids[:, :20], short)
    assert cropped.get_seq_length() == short.get_seq_length() == 20
    for a, b in zip(cropped.layers, short.layers, strict=True):
        assert (a.keys[:, :, :20].int() - b.keys[:, :, :20].int()).abs().max() <= 1
    assert_same_but_for_ties(logits_of(int8, ids[:, 20:], cropped), logits_of(int8, ids[:, 20:], short))
    cropped.crop(0)
    assert cropped.get_seq_length() == 24


def test_crop_refuses_a_length(int8, ids):
    """The old meaning, a length to keep, is an error rather than a misunderstanding."""
    cache = new_cache(int8)
    logits_of(int8, ids, cache)
    with pytest.raises(ValueError, match=r"crop\(20\)"):
        cache.crop(20)


def test_rows_are_reordered_repeated_and_selected(int8, ids):
    """The three changes of the batch that generation makes, on all four tensors of every layer."""
    cache = new_cache(int8)
    logits_of(int8, ids, cache)
    before = copy.deepcopy(cache)
    names = ("keys", "values", "key_scales", "value_scales")

    def assert_rows(expected):
        for layer, old in zip(cache.layers, before.layers, strict=True):
            for name in names:
                assert torch.equal(getattr(layer, name), getattr(old, name)[expected])

    cache.reorder_cache(torch.tensor([1, 0]))
    assert_rows([1, 0])
    cache.batch_repeat_interleave(2)
    assert_rows([1, 1, 0, 0])
    cache.batch_select_indices(torch.tensor([0, 3]))
    assert_rows([1, 0])
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes == 0
    logits_of(int8, ids, cache)
    for layer, old in zip(cache.layers, before.layers, strict=True):
        assert torch.equal(layer.keys, old.keys)


# apply


def test_no_weight_changes(tiny):
    """The technique is the cache alone."""
    model = tiny()
    before = {name: (values.data_ptr(), values.clone()) for name, values in model.state_dict().items()}
    assert apply(model) is model
    for name, values in model.state_dict().items():
        assert values.data_ptr() == before[name][0] and torch.equal(values, before[name][1])
    assert isinstance(new_cache(model), Int8Cache)
    assert new_cache(model) is not new_cache(model), "two generations must not share a cache"


def test_second_cache_is_refused(tiny):
    with pytest.raises(ValueError, match="apply kv_cache_quant once"):
        apply(apply(tiny()))


def test_on_an_accelerator(any_tiny, ids, accelerator):
    """Nothing of the cache stays behind on the CPU, and it is read as there."""
    expected = logits_of(any_tiny, ids, Int8Cache())
    model, cache = any_tiny.to(accelerator), Int8Cache()
    actual = stepwise_logits(model, ids.to(accelerator), cache).cpu()
    assert (actual - expected).abs().mean() < 0.01
    assert all(getattr(layer, name).device.type == accelerator.type for layer in cache.layers for name in layer.STORED)


@pytest.mark.embedded
def test_embedded_model_loses_almost_nothing(embedded, embedded_reference):
    """Real text through the cache: at most 0.002 nats a token, and not exactly nothing, which would mean that the cache
    was not read."""
    windows = 2
    reference = quality.Reference(
        windows=embedded_reference.windows[:windows],
        nll=embedded_reference.nll[:windows],
        top_ids=embedded_reference.top_ids[:windows],
        top_log_probs=embedded_reference.top_log_probs[:windows],
        chunk=embedded_reference.chunk,
    )
    summary = quality.score_variant(apply(embedded.model), reference)
    assert 1e-5 < summary["kl_divergence"] <= 0.002
    assert summary["top1_agreement"] > 0.96
    assert summary["perplexity_retention"] == pytest.approx(1, abs=0.01)


@pytest.mark.embedded
def test_the_small_class(embedded_loaded_once):
    """`KVCacheQuantInference().generate(...)` answers through the int8 cache."""
    inference = kv_cache_quant.KVCacheQuantInference("smollm2-135m", device="cpu")
    assert isinstance(new_cache(inference.model), Int8Cache)
    assert "Paris" in inference.generate("The capital of France is", max_new_tokens=3)
