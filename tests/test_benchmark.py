"""Speed and bytes against known truths: a model that takes a known time, models whose bytes can be counted by hand."""

import time
from types import SimpleNamespace

import pytest
import torch
from conftest import make_tiny
from safetensors.torch import load_file
from torch import nn

import benchmark
import saving
from benchmark import (
    Workload,
    cache_bytes,
    count_parameters,
    evidence,
    main_dtype,
    measure_memory,
    new_cache,
    stored_tensors,
    streamed_bytes,
    time_generation,
    weight_bytes,
)


class Fake:
    """A model whose forward takes `seconds_per_token` for each token it is given, on the clock it is given."""

    def __init__(self, seconds_per_token, *, wait=time.sleep, vocabulary=11, bad_from_step=None):
        self.seconds_per_token, self.wait, self.vocabulary = seconds_per_token, wait, vocabulary
        self.bad_from_step = bad_from_step
        self.lengths, self.kept = [], []

    def make_cache(self):
        return SimpleNamespace(nbytes=1234)

    def __call__(self, *, input_ids, past_key_values, use_cache, logits_to_keep):
        assert use_cache and past_key_values.nbytes == 1234
        self.wait(self.seconds_per_token * input_ids.shape[1])
        self.lengths.append(input_ids.shape[1])
        self.kept.append(logits_to_keep)
        logits = torch.zeros(input_ids.shape[0], 1, self.vocabulary)
        logits[:, :, len(self.lengths) % self.vocabulary] = 1
        if self.bad_from_step is not None and len(self.lengths) > self.bad_from_step:
            logits[:] = float("nan")
        return SimpleNamespace(logits=logits)


class Clock:
    """A clock that only waiting moves, so that a reading can be compared exactly."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def wait(self, seconds):
        self.now += seconds


def prompt(rows, length):
    return torch.ones(rows, length, dtype=torch.long)


def test_known_durations_are_read(monkeypatch):
    """Prefill and decode apart: 6 tokens of 0.1 s, then 4 steps of 0.1 s. The first token belongs to prefill, whatever
    was fed before for depth belongs to nothing, and every rate follows from these."""
    clock = Clock()
    monkeypatch.setattr(benchmark, "time", clock)
    fake = Fake(0.1, wait=clock.wait)
    timing = time_generation(fake, prompt(3, 10), new_tokens=5, depth=4)
    assert fake.lengths == [4, 6, 1, 1, 1, 1]
    assert set(fake.kept) == {1}, "logits of more than the last position would dominate the peak of memory"
    assert timing.prefill_s == pytest.approx(0.6) and timing.ttft_s == pytest.approx(0.6)
    assert timing.decode_s == pytest.approx(0.4)
    assert timing.kv_cache_bytes == 1234
    rates = timing.rates(6)
    assert rates["ttft_ms"] == pytest.approx(600)
    assert rates["prefill_tokens_per_s"] == pytest.approx(3 * 6 / 0.6)
    assert rates["tpot_ms"] == pytest.approx(100)
    assert rates["decode_tokens_per_s"] == pytest.approx(3 * 4 / 0.4)


def test_sleep_is_read_within_three_percent():
    """The same with a real clock: 20 ms a token reads as 50 tokens/s. The best of five, as others share this machine."""
    timings = [time_generation(Fake(0.02), prompt(1, 3), new_tokens=5) for _ in range(5)]
    assert min(timing.prefill_s for timing in timings) == pytest.approx(0.06, rel=0.03)
    assert min(timing.decode_s for timing in timings) == pytest.approx(0.08, rel=0.03)
    assert max(timing.rates(3)["decode_tokens_per_s"] for timing in timings) == pytest.approx(50, rel=0.03)


def test_one_new_token_has_no_decode_rate():
    """A single token is all prefill: decode is absent, not zero or infinite."""
    rates = time_generation(Fake(0.0), prompt(1, 4), new_tokens=1).rates(4)
    assert set(rates) == {"ttft_ms", "prefill_tokens_per_s"}


@pytest.mark.parametrize("bad_from_step", [0, 2])
def test_nan_logits_are_no_result(bad_from_step):
    """A model that computes NaN, at once or after a while, is not timed but refused."""
    with pytest.raises(FloatingPointError, match="not finite"):
        time_generation(Fake(0.0, bad_from_step=bad_from_step), prompt(1, 4), new_tokens=4)


def test_tokens_are_the_greedy_ones(tiny, ids):
    """What is timed is real generation: the tokens are those of transformers' own greedy search."""
    model = tiny()
    timing = time_generation(model, ids, new_tokens=8, depth=10)
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)[:, 24:]
    assert torch.equal(timing.tokens, expected)


def test_first_module_with_nan_is_named(tiny, ids):
    """A NaN in one weight is traced to that module, not to all that come after."""
    model = tiny()
    assert benchmark.first_non_finite_module(model, ids) is None
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    assert benchmark.first_non_finite_module(model, ids) == "model.layers.1.mlp.up_proj"
    assert not any(module._forward_hooks for module in model.modules()), "hooks must not stay"


# Bytes


def hand_count(config, *, layers=3):
    """Parameters of one embedding table and of everything else that is not lm_head."""
    d, width, inner = config.head_dim, config.hidden_size, config.intermediate_size
    attention = 2 * width * d * (config.num_attention_heads + config.num_key_value_heads)
    table = config.vocab_size * width
    return table, layers * (attention + 3 * width * inner + 2 * width) + width


@pytest.mark.parametrize("shape", ["grouped", "three_a_group", "multi_head"])
def test_bytes_of_an_untied_model(shape):
    """Counted by hand: two tables; decode reads all but the input table."""
    model = make_tiny(shape)
    table, rest = hand_count(model.config)
    buffers = sum({buffer.data_ptr(): buffer.nbytes for buffer in model.buffers()}.values())  # rotary frequencies
    assert count_parameters(model) == 2 * table + rest
    assert weight_bytes(model) == 4 * (2 * table + rest) + buffers
    assert streamed_bytes(model) == 4 * (table + rest) + buffers
    assert buffers < 200


@pytest.mark.parametrize("shape", ["grouped", "three_a_group", "multi_head"])
def test_bytes_of_a_tied_model(shape):
    """One table, counted once and read once a token, as lm_head."""
    model = make_tiny(shape, tied=True)
    table, rest = hand_count(model.config)
    buffers = sum({buffer.data_ptr(): buffer.nbytes for buffer in model.buffers()}.values())
    assert count_parameters(model) == table + rest
    assert weight_bytes(model) == streamed_bytes(model) == 4 * (table + rest) + buffers


def test_one_storage_in_two_parameters_counts_once(tiny):
    """Tied by value rather than by object, as after a technique has wrapped a weight anew: still one tensor in memory."""
    model, tied = tiny(), tiny(tied=True)
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.data, requires_grad=False)
    assert weight_bytes(model) == streamed_bytes(model) == weight_bytes(tied)
    assert sum(evidence(model)["bytes_by_dtype"].values()) == weight_bytes(tied)
    assert len(stored_tensors(model)) == len(stored_tensors(tied))


def test_half_the_dtype_is_half_the_bytes(tiny):
    """And the dtype that most bytes have is what a record states."""
    model = tiny()
    full, streamed = weight_bytes(model), streamed_bytes(model)
    assert main_dtype(model) == "float32"
    model.to(torch.bfloat16)
    assert weight_bytes(model) == full // 2 and streamed_bytes(model) == streamed // 2
    assert main_dtype(model) == "bfloat16"


def test_packed_modules_are_counted(tiny):
    """Weights that are neither parameters nor buffers count through `packed_tensors`, and for as many parameters as
    they stand for."""

    class Packed(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.packed = linear.weight.data.to(torch.int8)
            self.logical_parameters = linear.weight.numel()

        def packed_tensors(self):
            return {"weight": self.packed}

    model = tiny()
    parameters, before, streamed = count_parameters(model), weight_bytes(model), streamed_bytes(model)
    gate = model.model.layers[0].mlp.gate_proj
    model.model.layers[0].mlp.gate_proj = Packed(gate)
    assert count_parameters(model) == parameters
    assert weight_bytes(model) == before - 3 * gate.weight.numel()
    assert streamed_bytes(model) == streamed - 3 * gate.weight.numel()
    assert "model.layers.0.mlp.gate_proj.weight" in stored_tensors(model)


def test_evidence_states_what_is_there(tiny):
    """Heads, layers, kinds and dtypes as they are, not as the configuration says."""
    model = tiny("three_a_group")
    model.config.num_attention_heads = 99
    seen = evidence(model)
    assert (seen["query_heads"], seen["kv_heads"], seen["layers"]) == (27, 9, 3)
    assert seen["linear_kinds"] == {"Linear": 3 * 7 + 1}
    assert seen["cache"] == "DynamicCache"
    assert sum(seen["bytes_by_dtype"].values()) == weight_bytes(model)


@torch.inference_mode()
def test_cache_bytes_by_hand(tiny, ids):
    """2 rows x 24 tokens x 2 KV heads x 16 numbers, keys and values, 3 layers, 4 bytes; an empty cache holds nothing."""
    model = tiny()
    cache = new_cache(model)
    assert cache_bytes(cache) == 0
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    assert cache_bytes(cache) == 2 * 24 * 2 * 16 * 2 * 3 * 4


def test_measure_memory_reports_the_cache_of_the_full_run(tiny, ids):
    """After P + N - 1 tokens, as the last token generated is never fed back."""
    phases = measure_memory(tiny(), ids, new_tokens=5)
    assert phases["kv_cache_mb"] * 1e6 == pytest.approx(2 * 28 * 2 * 16 * 2 * 3 * 4)
    assert phases["prefill_peak_mb"] > 0 and phases["decode_peak_mb"] > 0


def test_workload_positions():
    """The longest sequence: depth, prompt and new tokens together."""
    assert Workload(prompt_tokens=5, new_tokens=7, depth=11).positions == 23


def test_bytes_of_a_token_by_hand():
    """1000 bytes of weights, and of a cache of 32 bytes for 32 tokens the 28 + 4 / 2 that are there on average; both for two
    tokens where each pass decodes two."""
    work = Workload(prompt_tokens=8, new_tokens=4, depth=20)
    assert work.bytes_per_token(1000, 32e-6) == pytest.approx(1030)
    assert work.bytes_per_token(1000, 32e-6, tokens_per_pass=2) == pytest.approx(515)


def test_a_model_of_many_files_has_each_tensor_once(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "SHARD_MB", 0.02)
    model = tiny(tied=True)
    saving.save_model(model, tmp_path)
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert sorted(name for file in files for name in load_file(file)) == sorted(benchmark.stored_tensors(model))
