"""Prompt lookup: the draft is the longest, then latest match; the output is plain greedy decoding's; the counts are true."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from conftest import make_tiny
from transformers import DynamicCache

import benchmark
import inputs
import models
import speculation
from benchmark import greedy_steps, time_generation
from devices import Unsupported
from inference import generate_ids
from kernels.build import load_kernels
from optimizations import int4, kv_cache_quant, lean_decode, mixed_precision, prompt_lookup, quantization
from optimizations.prompt_lookup import apply, check, find_draft


def with_source(model):
    model.source = SimpleNamespace(name="tiny", kind="folder", random_weights=False)
    return model


RECIPES = {
    "int8": quantization.apply,
    "weight_only": lambda model: quantization.apply(model, scheme="weight-only"),
    "int8 cache": lambda model: kv_cache_quant.apply(quantization.apply(model)),
    "int4": lambda model: int4.apply(with_source(model), rounding="nearest", int8_layers="none", group_size=32),
    "bf16": mixed_precision.apply,
}


@pytest.fixture
def kernels():
    if reason := load_kernels():
        pytest.skip(reason)


# Drafts


@pytest.mark.parametrize(
    ("history", "draft"),
    [
        ([1, 2, 3, 4, 9, 2, 3], [4, 9, 2]),  # what followed 2 3
        ([5, 2, 3, 7, 2, 3, 8, 2, 3], [8, 2, 3]),  # twice there: the latest
        ([1, 2, 3, 7, 5, 2, 3, 8, 1, 2, 3], [7, 5, 2]),  # longer, though earlier
        ([4, 1, 2, 1, 2], [1, 2, 1]),  # a match that reaches the end goes on as it began
        ([6, 6, 6], [6, 6, 6]),
        ([1, 2, 3], []),
        ([3, 1, 3], []),  # one token is not enough
        ([1], []),
    ],
)
def test_the_longest_then_latest_match_is_drafted(history, draft):
    assert find_draft(history, limit=3, ngram=2) == draft


def test_limits_of_a_draft():
    history = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2]
    assert find_draft(history, limit=15, ngram=2) == [3, 4, 5, 6], "twice the match"
    assert find_draft(history, limit=0, ngram=2) == find_draft(history, limit=9, ngram=3) == []
    assert find_draft([3, 1, 3], limit=9, ngram=1) == [1, 3]
    long = [*range(100), *range(100)]
    assert find_draft(long[:-5], limit=5, ngram=2) == long[-5:]


def test_drafts_equal_those_of_a_slow_search():
    def slow(history, limit):
        best, start = 0, 0
        for end in range(1, len(history)):
            same = 0
            while same < end and history[end - 1 - same] == history[-1 - same]:
                same += 1
            best, start = (same, end) if same and same >= best else (best, start)
        grown = list(history)
        for _ in range(min(limit, 2 * best) if best >= 2 else 0):
            grown.append(grown[start + len(grown) - len(history)])
        return grown[len(history) :]

    generator = torch.Generator().manual_seed(0)
    for length in range(1, 60):
        history = torch.randint(3, (length,), generator=generator).tolist()
        assert find_draft(history, limit=7, ngram=2) == slow(history, 7), history


# The same tokens as without


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_output_is_that_of_plain_decoding(recipe, ids, kernels):
    """Token for token, whatever was drafted; both through generate and where it is timed, at depth too."""
    model = lean_decode.apply(RECIPES[recipe](make_tiny()))
    prompt = ids[:1].repeat(1, 2)
    expected = generate_ids(model, prompt, max_new_tokens=80)
    model = apply(model)
    assert "bit for bit" in model.notes[-1]
    assert torch.equal(generate_ids(model, prompt, max_new_tokens=80), expected)
    for new_tokens in (1, 2, 80):
        timing = time_generation(model, prompt, new_tokens=new_tokens, depth=11)
        plain = time_generation(model, prompt, new_tokens=new_tokens, depth=11, steps=greedy_steps)
        assert torch.equal(timing.tokens, plain.tokens) and timing.tokens.shape == (1, new_tokens)
    assert timing.passes <= plain.passes == 79 and plain.drafted == 0 < timing.drafted


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_right_drafts_are_accepted_as_far_as_they_are_right(recipe, ids, kernels, monkeypatch):
    """Five right tokens and a wrong one: six tokens a pass, the last of them the model's own."""
    model = apply(lean_decode.apply(RECIPES[recipe](make_tiny())))
    expected = time_generation(model, ids[:1], new_tokens=61, steps=greedy_steps).tokens

    def foresee(history, *, limit, ngram):
        right = expected[0, len(history) - 24 :][:5].tolist()
        return [*right, 0 if expected[0, len(history) - 19] else 1, 5, 5][:limit] if limit > 5 else right[:limit]

    monkeypatch.setattr(prompt_lookup, "find_draft", foresee)
    timing = time_generation(model, ids[:1], new_tokens=61)
    assert torch.equal(timing.tokens, expected) and timing.passes == 10 and timing.drafted == 9 * 8 + 5


def test_near_ties_are_judged_again_alone(ids, monkeypatch):
    """A model whose passes over several rows are off by a little, as float32 products are, only more: no token may differ."""
    plain = make_tiny()
    prompt = ids[:1].repeat(1, 2)
    expected = generate_ids(plain, prompt, max_new_tokens=80)
    model, forward = make_tiny(), plain.forward
    noise = 0.3 * torch.randn(97, generator=torch.Generator().manual_seed(1))

    def less_exact(**arguments):
        output = forward(**arguments)
        output.logits = output.logits + noise * (1 < arguments["input_ids"].shape[1] <= 11)  # drafts; the prompt is longer
        return output

    monkeypatch.setattr(model, "forward", less_exact)
    again = generate_ids(apply(model), prompt, max_new_tokens=80)
    assert "alone where the best two" in model.notes[-1] and torch.equal(again, expected)
    model.greedy_steps.keywords["doubt"] = 0.0
    assert not torch.equal(generate_ids(model, prompt, max_new_tokens=80), expected), "nothing was near enough to show it"
    model.greedy_steps.keywords["doubt"] = 1e9
    timing = time_generation(model, prompt, new_tokens=20)
    assert torch.equal(timing.tokens[0], expected[0, prompt.shape[1] :][:20]) and timing.passes > 19, "all is judged again"


def test_rejected_drafts_leave_no_trace(ids, kernels, monkeypatch):
    """Drafts that are always wrong cost passes, not tokens."""
    model = apply(lean_decode.apply(quantization.apply(make_tiny())))
    expected = time_generation(model, ids[:1], new_tokens=20, steps=greedy_steps).tokens
    monkeypatch.setattr(prompt_lookup, "find_draft", lambda history, *, limit, ngram: [96, 1, 96, 1][:limit])
    timing = time_generation(model, ids[:1], new_tokens=20)
    assert torch.equal(timing.tokens, expected) and timing.drafted == 4 * 15 + 3 + 2 + 1


def test_generation_ends_where_transformers_ends_it(ids):
    model = make_tiny()
    plain = generate_ids(model, ids[:1], max_new_tokens=60)[0, 24:].tolist()
    model = apply(model)
    for end in dict.fromkeys(plain):
        model.generation_config.eos_token_id = [end, 1000]
        new = generate_ids(model, ids[:1], max_new_tokens=60)[0, 24:].tolist()
        assert new == plain[: plain.index(end) + 1]


def test_batches_and_other_ways_to_choose_go_the_usual_way(ids):
    model = make_tiny()
    expected = time_generation(model, ids, new_tokens=8).tokens
    beams = generate_ids(model, ids[:1], max_new_tokens=8, num_beams=3)
    model = apply(model)
    assert torch.equal(time_generation(model, ids, new_tokens=8).tokens, expected)
    assert torch.equal(generate_ids(model, ids, max_new_tokens=8)[:, 24:], expected)
    assert torch.equal(generate_ids(model, ids[:1], max_new_tokens=8, num_beams=3), beams)


def test_rows_that_differ_are_noted(monkeypatch):
    monkeypatch.setattr(prompt_lookup, "judges_as_single", lambda model, rows: 2e-5)
    assert "nearer than 8e-05" in apply(make_tiny()).notes[-1]


def test_refusals():
    with pytest.raises(ValueError, match="apply prompt_lookup once"):
        apply(apply(make_tiny()))
    model = make_tiny()
    model.source = models.ModelSource("tiny", "random", "")
    with pytest.raises(Unsupported, match="random weights"):
        apply(model)
    for options in ({"draft_tokens": 0}, {"draft_tokens": 16}, {"ngram": 0}):
        with pytest.raises(ValueError, match="--" + next(iter(options)).replace("_", "-")):
            check(make_tiny().config, **apply.__kwdefaults__ | options)


def test_a_cache_that_cannot_forget_is_refused(monkeypatch):
    class Stubborn(DynamicCache):
        def crop(self, tokens_to_remove):
            pass

    model = make_tiny()
    model.make_cache = lambda: Stubborn(config=model.config)
    with pytest.raises(ValueError, match="Stubborn kept rejected tokens"):
        apply(model)


# What is counted


def scripted(model, ids, cache, *, new_tokens):
    """Passes that judge three drafted tokens and accept one, as far as tokens are left."""
    for done in range(0, new_tokens, 2):
        yield torch.zeros(1, min(2, new_tokens - done), dtype=torch.long), torch.zeros(1, 4, 5)


def test_accepted_tokens_are_counted(ids):
    model = make_tiny()
    model.greedy_steps = scripted
    timing = time_generation(model, ids[:1], new_tokens=9)
    assert (timing.passes, timing.drafted, timing.tokens.shape) == (4, 12, (1, 9))
    measured = speculation.measure(model, {"free": [[1, 2, 3], [4, 5]]}, new_tokens=9, pairs=2)["free"]
    assert measured["acceptance_rate"] == 8 / 24 and measured["tokens_per_pass"] == 2 and measured["drafted"] == 24
    assert measured["identical"] == 0
    assert benchmark.measure_memory(model, ids[:1], new_tokens=9)["tokens_per_pass"] == 2


def test_the_gain_of_drafts_by_hand(ids, monkeypatch):
    """Drafting that takes half the time of plain decoding gives 2x."""
    model, time_it = make_tiny(), benchmark.time_generation
    model.greedy_steps = scripted

    def timed(*arguments, steps, **options):
        timing = time_it(*arguments, steps=steps, **options)
        return dataclasses.replace(timing, decode_s=2.0 if steps is greedy_steps else 1.0)

    monkeypatch.setattr(benchmark, "time_generation", timed)
    assert speculation.measure(model, {"free": [[1, 2, 3]]}, new_tokens=9, pairs=2)["free"]["speedup"] == 2


def test_plain_decoding_has_no_such_figures():
    assert speculation.measure(make_tiny(), {"free": [[1, 2]]}, pairs=1) is None
    assert speculation.measure(apply(make_tiny()), {}, pairs=1) is None


@pytest.mark.embedded
def test_summaries_of_the_embedded_model(embedded, kernels):
    """On a real model and real prompts: the very tokens of plain decoding, in fewer passes."""
    model = apply(lean_decode.apply(quantization.apply(embedded.model)))
    assert "bit for bit" in model.notes[-1]
    prompts = {kind: rows[:2] for kind, rows in inputs.speculation_prompts(embedded.tokenizer, longest=2000).items()}
    measured = speculation.measure(model, prompts, new_tokens=32, pairs=1)
    assert all(figures["identical"] == 1 for figures in measured.values())
    assert measured["summarising"]["tokens_per_pass"] > 1.1 and 0 < measured["summarising"]["acceptance_rate"] < 1
