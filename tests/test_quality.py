"""Quality against known truths: models whose perplexity and divergence can be written down."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import logits_of
from transformers import DynamicCache

import quality
from quality import Reference, bootstrap_interval, cut_windows, score_baseline, score_variant

VOCABULARY = 97


class Fixed:
    """A model that gives the same logits [V] at every position, or `answer(ids)` [T, V] where that is given."""

    device = torch.device("cpu")

    def __init__(self, logits=None, *, answer=None):
        self.answer = answer or (lambda ids: logits.expand(len(ids), -1))
        self.chunks = []

    def make_cache(self):
        return SimpleNamespace()

    def __call__(self, *, input_ids, past_key_values, use_cache):
        self.chunks.append(input_ids.shape[1])
        return SimpleNamespace(logits=self.answer(input_ids[0])[None])


@pytest.fixture
def windows():
    return torch.randint(VOCABULARY, (4, 33), generator=torch.Generator().manual_seed(3))


def random_logits(seed, size=VOCABULARY):
    return 2 * torch.randn(size, generator=torch.Generator().manual_seed(seed))


# Perplexity


@pytest.mark.parametrize("vocabulary", [97, 5000])
def test_uniform_logits_give_the_size_of_the_vocabulary(windows, vocabulary):
    """A model that knows nothing is as perplexed as there are tokens."""
    summary = quality.baseline_summary(score_baseline(Fixed(torch.zeros(vocabulary)), windows, chunk=8))
    assert summary["perplexity"] == pytest.approx(vocabulary, rel=1e-5)
    assert summary["scored_tokens"] == 4 * 32, "each window's first token has nothing to predict it"


def test_perplexity_by_hand(windows):
    """exp of the mean of -log p(next token), over tokens 2 to T of every window."""
    logits = random_logits(0)
    log_p = (logits.double() - logits.double().exp().sum().log()).tolist()
    by_hand = math.exp(-sum(log_p[token] for window in windows.tolist() for token in window[1:]) / (4 * 32))
    summary = quality.baseline_summary(score_baseline(Fixed(logits), windows, chunk=8))
    assert summary["perplexity"] == pytest.approx(by_hand, rel=1e-5)


def test_a_model_that_knows_the_next_token():
    """Each position must be scored against the token after it: a model that gets it right has perplexity 1. One that
    repeats its input would win if the targets were off by one."""
    window = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9], [9, 1, 2, 3, 4, 5, 6, 7, 8]])
    successor = Fixed(answer=lambda ids: 50.0 * torch.nn.functional.one_hot(ids % 9 + 1, VOCABULARY).float())
    echo = Fixed(answer=lambda ids: 50.0 * torch.nn.functional.one_hot(ids, VOCABULARY).float())
    assert quality.baseline_summary(score_baseline(successor, window, chunk=4))["perplexity"] == pytest.approx(1)
    assert quality.baseline_summary(score_baseline(echo, window, chunk=4))["perplexity"] > 1e6


@pytest.mark.parametrize("chunk", [1, 7, 32, 100])
def test_chunks_through_the_cache_equal_one_pass(tiny, windows, chunk):
    """Whatever the size of the chunks, each token is predicted from all that came before it in its window, and from
    nothing of another window."""
    model = tiny()
    chunked = score_baseline(model, windows, chunk=chunk)
    expected = -logits_of(model, windows)[:, :-1].log_softmax(-1).gather(2, windows[:, 1:, None])[..., 0]
    torch.testing.assert_close(chunked.nll, expected, atol=1e-4, rtol=0)


def test_the_models_own_cache_is_used(tiny, windows):
    """Scoring asks the model for its cache, one a window, and really fills it: else an int8 cache would go unmeasured."""
    model, made = tiny(), []

    def make_cache():
        made.append(DynamicCache(config=model.config))
        return made[-1]

    model.make_cache = make_cache
    score_baseline(model, windows, chunk=8)
    assert [cache.get_seq_length() for cache in made] == [32] * 4


# Divergence, agreement, retention


@pytest.mark.parametrize("shift", [0.01, 0.5, 3.0, -2.0])
def test_divergence_of_a_shifted_logit(windows, shift):
    """Raising one logit by s: KL(p || q) = log(1 + p_k (e^s - 1)) - p_k s, exactly."""
    logits = random_logits(0)
    shifted = logits.clone()
    shifted[5] += shift
    p = float(logits.double().softmax(-1)[5])
    expected = math.log(1 + p * (math.exp(shift) - 1)) - p * shift
    summary = score_variant(Fixed(shifted), score_baseline(Fixed(logits), windows, chunk=8))
    assert summary["kl_divergence"] == pytest.approx(expected, rel=1e-3, abs=3e-7)


def test_divergence_is_baseline_against_variant_and_not_the_reverse(windows):
    """The two directions differ; the definition takes the expectation under the baseline."""
    base, other = random_logits(0), random_logits(1)
    p, q = base.double().log_softmax(-1), other.double().log_softmax(-1)
    forward, reverse = float((p.exp() * (p - q)).sum()), float((q.exp() * (q - p)).sum())
    assert abs(forward - reverse) > 0.05
    summary = score_variant(Fixed(other), score_baseline(Fixed(base), windows, chunk=8))
    assert summary["kl_divergence"] == pytest.approx(forward, rel=1e-4)


def test_divergence_of_a_large_vocabulary_is_a_lower_bound(windows):
    """Beyond the 1024 kept tokens the rest is one outcome: never above the true value, and close to it for an even tail."""
    base = torch.cat([random_logits(0, 1024) + 6, random_logits(1, 4000)])
    other = torch.cat([random_logits(2, 1024) + 6, random_logits(1, 4000)])
    p, q = base.double().log_softmax(-1), other.double().log_softmax(-1)
    true = float((p.exp() * (p - q)).sum())
    summary = score_variant(Fixed(other), score_baseline(Fixed(base), windows, chunk=8))
    assert 0.9 * true < summary["kl_divergence"] <= true * (1 + 1e-6)


def test_an_identical_model_loses_nothing(tiny, windows):
    """Zero divergence, full agreement, retention 1, and an interval without width."""
    model = tiny()
    reference = score_baseline(model, windows, chunk=8)
    summary = score_variant(model, reference)
    assert summary["kl_divergence"] == pytest.approx(0, abs=1e-7)
    assert summary["top1_agreement"] == 1
    assert summary["perplexity_retention"] == 1 and summary["perplexity_retention_ci"] == [1, 1]
    assert summary["delta_nll"] == 0 and summary["delta_nll_ci"] == [0, 0]
    assert summary["perplexity"] == quality.baseline_summary(reference)["perplexity"]


def test_retention_by_hand(windows):
    """Baseline perplexity over variant perplexity: below 1 where the variant is worse."""
    good, bad = random_logits(0), torch.zeros(VOCABULARY)
    good = good.scatter_add(0, windows.flatten(), torch.full((windows.numel(),), 0.3))  # knows which tokens are common
    reference = score_baseline(Fixed(good), windows, chunk=8)
    perplexity = quality.baseline_summary(reference)["perplexity"]
    summary = score_variant(Fixed(bad), reference)
    assert summary["perplexity_retention"] == pytest.approx(perplexity / VOCABULARY, rel=1e-5)
    assert summary["delta_nll"] == pytest.approx(math.log(VOCABULARY / perplexity), rel=1e-5)
    low, high = summary["perplexity_retention_ci"]
    assert low <= summary["perplexity_retention"] <= high and low < high


def test_agreement_counts_equal_first_choices(windows):
    """A variant whose favourite differs after one token in particular agrees wherever that token does not stand."""
    base = random_logits(0)
    other = base.clone()
    other[int(base.argmin())] = base.max() + 1
    token = int(windows[0, 0])
    variant = Fixed(answer=lambda ids: torch.where((ids == token)[:, None], other, base))
    summary = score_variant(variant, score_baseline(Fixed(base), windows, chunk=8))
    share = float((windows[:, :-1] != token).double().mean())
    assert share < 1 and summary["top1_agreement"] == pytest.approx(share)


def test_windows_are_compared_at_the_same_place(tiny, windows, tmp_path):
    """A reference that went through a file gives the same comparison."""
    model, other = tiny(seed=0), tiny(seed=1)
    reference = score_baseline(model, windows, chunk=8)
    reference.save(tmp_path / "reference.safetensors")
    loaded = Reference.load(tmp_path / "reference.safetensors", chunk=8)
    assert score_variant(other, loaded) == score_variant(other, reference)


def test_on_an_accelerator(tiny, windows, accelerator):
    """MPS has no float64: what needs it must leave the device first."""
    model = tiny()
    reference = score_baseline(model, windows, chunk=8)
    summary = score_variant(model.to(accelerator), reference)
    assert summary["kl_divergence"] < 1e-3 and summary["top1_agreement"] > 0.99


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_logits_are_no_result(windows, bad):
    """One bad number anywhere ends the scoring instead of becoming a perplexity."""
    reference = score_baseline(Fixed(random_logits(0)), windows, chunk=8)
    broken = random_logits(0)
    broken[3] = bad
    with pytest.raises(FloatingPointError, match="not finite"):
        score_baseline(Fixed(broken), windows, chunk=8)
    with pytest.raises(FloatingPointError, match="not finite"):
        score_variant(Fixed(broken), reference)


# Windows


def test_windows_are_disjoint_and_in_order():
    """The text's first tokens, none twice, none skipped; fewer windows where the text holds fewer."""
    assert cut_windows(list(range(100)), windows=3, window=10).tolist() == [list(range(s, s + 10)) for s in (0, 10, 20)]
    assert cut_windows(list(range(57)), windows=16, window=10).shape == (5, 10)


@pytest.mark.parametrize("length", [0, 1, 512, 1023])
def test_too_short_a_text(length):
    """Fewer than two windows give no interval: refused in one sentence that names the flag."""
    with pytest.raises(ValueError, match=f"--text-file: {length} tokens.*512"):
        cut_windows(list(range(length)), windows=16, window=512)


# Intervals


def test_interval_covers_the_truth_as_often_as_it_says():
    """16 windows of normal differences: a 95 % interval holds the true mean in roughly 95 % of 300 samples (BCa runs a
    few points low at this size), an 80 % one in roughly 80 %."""
    rng = np.random.default_rng(0)
    samples = rng.normal(0.3, 1, (300, 16))

    def covered(confidence):
        intervals = [bootstrap_interval(sample, confidence=confidence) for sample in samples]
        return np.mean([low <= 0.3 <= high for low, high in intervals])

    assert 0.88 <= covered(0.95) <= 0.98
    assert 0.70 <= covered(0.80) <= 0.86


def test_interval_of_too_few_or_equal_values():
    """Two values decide nothing; equal ones leave no doubt; the same values always give the same interval."""
    assert bootstrap_interval([1.0, 2.0]) is None
    assert bootstrap_interval([0.5] * 6) == [0.5, 0.5]
    values = [0.1, 0.4, 0.2, 0.3, 0.9]
    assert bootstrap_interval(values) == bootstrap_interval(values)
    low, high = bootstrap_interval(values)
    assert 0.1 <= low < np.mean(values) < high <= 0.9


def test_windows_are_what_is_resampled():
    """Tokens of a window depend on each other: 128 of them would give an interval many times too narrow."""
    nll = torch.tensor([0.0, 0.1, 0.2, 0.6])[:, None].expand(4, 32)

    def summary(count):
        zeros = torch.zeros(count, 32)
        return quality._summary(nll[:count], zeros, zeros.flatten(), zeros.flatten())

    low, high = bootstrap_interval(nll.double().mean(1), confidence=0.95)
    assert summary(4)["delta_nll_ci"] == pytest.approx([low, high], abs=1e-6)
    assert summary(4)["perplexity_retention_ci"] == pytest.approx([math.exp(-high), math.exp(-low)], abs=1e-6)
    assert summary(2)["delta_nll_ci"] is None and summary(2)["perplexity_retention_ci"] is None


def test_decode_that_answers_unlike_chunks_is_no_quality(windows):
    """Decode has kernels of its own: a model that is right in chunks and wrong token by token must not pass."""
    logits, wrong = random_logits(0), random_logits(1)
    reference = score_baseline(Fixed(logits), windows, chunk=8)
    assert score_variant(Fixed(logits), reference)["perplexity_retention"] == 1
    for scale, said in ((0.1, None), (1.0, "nats apart")):
        shifted = Fixed(answer=lambda ids, scale=scale: (logits + scale * wrong * (len(ids) == 1)).expand(len(ids), -1))
        note = score_variant(shifted, reference)["note"]
        assert note is None if said is None else said in note
    broken = Fixed(answer=lambda ids: (5 * wrong if len(ids) == 1 else logits).expand(len(ids), -1))
    with pytest.raises(ValueError, match="token by token"):
        score_variant(broken, reference)
    assert broken.chunks[-17:] == [16] + [1] * 16
    assert quality.decode_difference(Fixed(logits), windows[0][:2], reference.nll[0][:1]) == 0
