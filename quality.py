"""How much of the model's judgement survives: perplexity, KL divergence, agreement, on real text, teacher-forced.

The text is cut into disjoint windows, each fed in chunks through the model's *own KV cache*, so that an int8 cache
is really read back: with one pass per window its damage would be invisible. The baseline's distributions are kept
as its 1024 most likely tokens, exactly, plus the mass of the rest: 6 kB a token instead of 197 kB.

Definitions (natural logarithms, float32 log-softmax, averages over all positions but each window's first):
    perplexity           = exp(mean negative log-likelihood)
    perplexity_retention = baseline perplexity / perplexity = exp(-delta_nll)
    kl_divergence        = mean KL(baseline || variant) in nats per token, the rest taken as one outcome; by the log-sum
                           inequality that never exceeds the true divergence
    top1_agreement       = share of positions where both rank the same token first
    delta_nll            = mean of the paired difference; its interval is a bootstrap over windows (BCa), because
                           neighbouring tokens are correlated
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import bootstrap

from benchmark import new_cache

SMALL_VOCABULARY = 65536  # ids fit 16 bits
BEFORE, DECODED = 96, 32  # tokens of one window: in one chunk, then one by one
# Nats a token between the two. Activations rounded one by one: 0.1; a whole chunk by one scale, torch's own int8: 1.1.
MOST_APART, WORTH_SAYING = 2.0, 0.3


def _top_tokens(vocabulary: int) -> tuple[int, torch.dtype]:
    """How many tokens are kept and how their ids are stored: 6 kB a position with either."""
    return (min(1024, vocabulary), torch.uint16) if vocabulary <= SMALL_VOCABULARY else (768, torch.int32)


@dataclass(frozen=True)
class Reference:
    """The baseline's answers for `windows` [W, T]: `nll` [W, T-1], and the top tokens' ids and log-probabilities."""

    windows: torch.Tensor
    nll: torch.Tensor
    top_ids: torch.Tensor
    top_log_probs: torch.Tensor
    chunk: int

    def save(self, path: Path) -> None:
        tensors = {name: getattr(self, name) for name in ("windows", "nll", "top_ids", "top_log_probs")}
        save_file(tensors, path)

    @classmethod
    def load(cls, path: Path, *, chunk: int) -> Reference:
        return cls(**load_file(path), chunk=chunk)


def cut_windows(token_ids: list[int], *, windows: int, window: int) -> torch.Tensor:
    """The first `windows` disjoint windows of `window` tokens, shape [W, T]; ValueError if the text is too short."""
    available = len(token_ids) // window
    if available < 2:
        raise ValueError(f"--text-file: {len(token_ids)} tokens do not fill two windows of {window}")
    count = min(windows, available)
    return torch.tensor(token_ids[: count * window]).view(count, window)


def score_baseline(model, windows: torch.Tensor, *, chunk: int) -> Reference:
    """One pass of the untouched model over `windows`."""
    nll, top_ids, top_log_probs = [], [], []
    for window in windows:
        for log_probs, targets in _log_probs(model, window, chunk):
            nll.append(-log_probs.gather(1, targets[:, None])[:, 0].cpu())
            kept, id_dtype = _top_tokens(log_probs.shape[1])
            top = log_probs.topk(kept, dim=1)
            top_ids.append(top.indices.cpu().to(id_dtype))
            top_log_probs.append(top.values.cpu())
    count, length = windows.shape
    return Reference(
        windows=windows,
        nll=torch.cat(nll).view(count, length - 1),
        top_ids=torch.cat(top_ids).view(count, length - 1, -1),
        top_log_probs=torch.cat(top_log_probs).view(count, length - 1, -1),
        chunk=chunk,
    )


def score_variant(model, reference: Reference) -> dict:
    """The quality fields of a record, against the baseline's `reference` on the same windows and chunks.

    Raises ValueError where one token at a time is answered unlike chunks: decode has kernels of its own.
    """
    nll, divergence, agreement = [], [], []
    for index, window in enumerate(reference.windows):
        position = 0
        for log_probs, targets in _log_probs(model, window, reference.chunk):
            here = slice(position, position + len(targets))
            ids = reference.top_ids[index, here].long().to(log_probs.device)
            base = reference.top_log_probs[index, here]
            nll.append(-log_probs.gather(1, targets[:, None])[:, 0].cpu())
            divergence.append(_kl_divergence(base, log_probs.gather(1, ids).cpu()))
            agreement.append((log_probs.argmax(1) == ids[:, 0]).cpu())
            position += len(targets)
    scored = torch.cat(nll).view_as(reference.nll)
    apart = decode_difference(model, reference.windows[0], scored[0])
    if not apart < MOST_APART:
        raise ValueError(
            f"token by token its answers are {apart:.2f} nats from those in chunks of {reference.chunk}: one is wrong"
        )
    note = f"decoded one by one, tokens are answered {apart:.1f} nats apart from what chunks give, which quality is scored on"
    summary = _summary(scored, reference.nll, torch.cat(divergence), torch.cat(agreement))
    return summary | {"note": note if apart > WORTH_SAYING else None}


def decode_difference(model, window: torch.Tensor, nll: torch.Tensor) -> float:
    """By how much `nll` [T-1] of a few tokens of `window` [T] changes when they are fed one by one: mean of its size, in nats.

    Chunks run on the kernels of a prompt, so that the figures of quality alone would say nothing of those that decode.
    """
    if len(window) < 3:
        return 0.0
    before = min(BEFORE, (len(window) - 1) // 2)
    last = min(before + DECODED, len(window) - 1)
    steps = _log_probs(model, window[: last + 1], 1, first=before)
    next(steps)
    single = torch.cat([-log_probs.gather(1, targets[:, None])[:, 0].cpu() for log_probs, targets in steps])
    return float((single - nll[before:last]).abs().mean())


def _log_probs(model, window: torch.Tensor, chunk: int, *, first: int | None = None):
    """Yield (log-probabilities [n, V], next tokens [n]) for each chunk of one window, through one cache.

    The first chunk may have a size of its own.

    Raises FloatingPointError on logits that are not finite.
    """
    window = window.to(model.device)
    cache = new_cache(model)
    start, size = 0, first or chunk
    while start < len(window) - 1:
        ids = window[start : min(start + size, len(window) - 1)]
        with torch.inference_mode():
            logits = model(input_ids=ids[None], past_key_values=cache, use_cache=True).logits[0]
            log_probs = logits.float().log_softmax(-1)
        if not torch.isfinite(log_probs).all():
            raise FloatingPointError(f"the logits are not finite at position {start} of a window")
        yield log_probs, window[start + 1 : start + 1 + len(ids)]
        start, size = start + len(ids), chunk


def _kl_divergence(base: torch.Tensor, variant: torch.Tensor) -> torch.Tensor:
    """KL per position from log-probabilities of the same tokens [n, K]; what is left of either is one more outcome.

    The remainder is clamped at 1e-12: the sum of 1024 float32 probabilities can pass 1 by rounding.
    """
    base, variant = base.double(), variant.double()
    base_tail = (1 - base.exp().sum(1)).clamp_min(1e-12)
    variant_tail = (1 - variant.exp().sum(1)).clamp_min(1e-12)
    inside = (base.exp() * (base - variant)).sum(1)
    return (inside + base_tail * (base_tail / variant_tail).log()).clamp_min(0)


def _summary(nll: torch.Tensor, baseline_nll: torch.Tensor, divergence: torch.Tensor, agreement: torch.Tensor) -> dict:
    difference = (nll - baseline_nll).double().mean(1).numpy()  # one number a window: windows are what is resampled
    delta = float(difference.mean())
    interval = bootstrap_interval(difference)
    return {
        "perplexity": float(nll.double().mean().exp()),
        "perplexity_retention": float(np.exp(-delta)),
        "perplexity_retention_ci": None if interval is None else [float(np.exp(-interval[1])), float(np.exp(-interval[0]))],
        "kl_divergence": float(divergence.mean()),
        "top1_agreement": float(agreement.double().mean()),
        "delta_nll": delta,
        "delta_nll_ci": interval,
        "scored_tokens": nll.numel(),
    }


def baseline_summary(reference: Reference) -> dict:
    """The quality fields of the baseline itself: its divergence from itself is zero by definition."""
    zero, same = torch.zeros(reference.nll.numel()), torch.ones(reference.nll.numel())
    return _summary(reference.nll, reference.nll, zero, same)


def bootstrap_interval(values, statistic=np.mean, *, confidence: float = 0.95) -> list[float] | None:
    """BCa bootstrap interval of `statistic`; None for fewer than three values, [v, v] when they are all equal."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 3:
        return None
    if np.ptp(values) == 0:
        return [float(values[0]), float(values[0])]
    result = bootstrap((values,), statistic, confidence_level=confidence, n_resamples=4999, rng=np.random.default_rng(0))
    return [float(result.confidence_interval.low), float(result.confidence_interval.high)]
