"""What techniques may learn from text: token windows of the calibration part, and the second moments of layer inputs.

The calibration text never overlaps the evaluation text (texts.py). A share of it may be written by the model itself
(fitting/generated_text.py), which keeps what is learnt from holding for one kind of text only. Random weights have no
words: their windows are seeded random ids, so that every technique still runs for its speed and size.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import transformers

import models
import texts
from fitting.calibration_cache import CalibrationCache
from fitting.generated_text import generated_windows

WINDOW = 512
REFIT_TOKENS = 98304  # bounds time where there is more text than the embedded one has
REFIT_BYTES = 2e9  # bounds what refitting holds besides the model (fitting/compensation.py)
TEXTS = ("mixed", "evaluated")  # what pruning may learn from


def calibration_ids(model, *, tokens: int, generated_share: float = 0.0, mixed: bool = False) -> torch.Tensor:
    """Windows of calibration text in the model's own tokens: int64 [tokens // 512 or fewer, 512], one at least, on its device.

    Up to a `generated_share` of them is written by the model itself. The others come from the calibration text or, `mixed`, in
    equal numbers from each of texts.calibration_texts(), longer ones making up for what short ones lack. Kinds take turns, and
    the windows of a kind are spread over its text, so that the first n windows are always a fair sample: who needs only a few
    takes these. Raises ValueError where no text has one window.
    """
    count = max(1, tokens // WINDOW)
    source = _source(model)
    if source.random_weights:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(model.config.vocab_size, (count, WINDOW), generator=generator).to(model.device)
    tokens_of_texts, start = _tokenised(texts.calibration_texts() if mixed else [texts.load_text("calibration")], source)
    found = [ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW).to(model.device) for ids in tokens_of_texts]
    if not sum(map(len, found)):
        raise ValueError(f"the calibration text has fewer tokens than one window of {WINDOW}")
    own = []
    if wanted := round(count * generated_share):
        own = [generated_windows(model, start, window=WINDOW)[:wanted]]
    left, chosen = count - sum(map(len, own)), []
    for index, windows in enumerate(ordered := sorted(found, key=len)):  # what a short text lacks, longer ones make up for
        share = min(len(windows), -(-left // (len(ordered) - index)))
        chosen.append(windows[torch.linspace(0, max(len(windows) - 1, 0), share).round().long()])
        left -= share
    kinds = [windows[_scattered(len(windows))] for windows in chosen + own]
    places = torch.cat([(torch.arange(len(windows)) + 0.5) / len(windows) for windows in kinds])
    return torch.cat(kinds)[places.argsort(stable=True)]


def has_text(model) -> bool:
    """Random weights have no words; a model that models.load_model did not make has no tokenizer to read any with."""
    source = getattr(model, "source", None)
    return source is not None and not source.random_weights


def _source(model) -> models.ModelSource:
    source = getattr(model, "source", None)
    if source is None:
        raise ValueError("calibration needs the model's tokenizer: load the model with models.load_model")
    return source


def _scattered(count: int) -> list[int]:
    """0 to count - 1 in such an order that every beginning of it is spread over all of them (van der Corput)."""
    bits = count.bit_length()
    mirrored = (int(f"{index:0{bits}b}"[::-1], 2) for index in range(2**bits))
    return [index for index in mirrored if index < count]


def _tokenised(found: list[texts.Text], source: models.ModelSource) -> tuple[list[torch.Tensor], int]:
    """Token ids of each text, int64 [T], and the token that begins any text.

    Kept on disk for GGUF files: making a tokenizer out of one takes seconds, and more memory than all of SmolLM2 in int4.
    """
    caches: list[CalibrationCache] = []
    if source.kind == "gguf":
        made_by = {"tokenizer": models.file_sha256(Path(source.location)), "transformers": transformers.__version__}
        caches = [CalibrationCache.named(tokens_of=text.sha256, **made_by) for text in found]
        kept = [cache.tensors("tokens") for cache in caches]
        if all(kept):
            return [tokens["ids"] for tokens in kept], int(kept[0]["start"])
    tokenizer = models.load_tokenizer(source)
    ids = [torch.tensor(tokenizer(text.content, verbose=False).input_ids) for text in found]
    marks = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    start = next((mark for mark in marks if mark is not None), 0)  # a tokenizer without either: any token begins a text
    for cache, tokens in zip(caches, ids, strict=False):
        cache.save_tensors("tokens", {"ids": tokens, "start": torch.tensor(start)})
    return ids, start


def add_text_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--calibration-text", choices=TEXTS, default="mixed",
        help="what calibration and recovery read: several kinds of text, or, as a contrast, other parts of the corpus that "
        "quality is measured on alone; that is less text, and keeps less of SmolLM2 even there (default: mixed)")  # fmt: skip


def check_text(text: str) -> None:
    """Raises ValueError for what is no choice."""
    if text not in TEXTS:
        raise ValueError(f"--calibration-text {text}: choose {' or '.join(TEXTS)}")


def refit_windows(model, text: str = "mixed") -> torch.Tensor:
    """To rank and refit on, int64 [W, 512]: as much text as memory allows; two windows of random ids for random weights.

    Of several kinds: from news alone ("evaluated") SmolLM2 less 25 % of its heads kept 86 % on news and 72 % on product
    reviews, from four kinds 95 and 89 %. None of it is the model's own: with a quarter of that it kept less on all text.
    """
    return _windows_of_refit(model, text, 0.0)


def healing_windows(model, text: str = "mixed") -> torch.Tensor:
    """To train on after pruning, likewise, but a quarter of it is the model's own."""
    return _windows_of_refit(model, text, 0.25)


def _windows_of_refit(model, text: str, generated_share: float) -> torch.Tensor:
    tokens = 2 * WINDOW if _source(model).random_weights else refit_tokens(model.config)
    return calibration_ids(model, tokens=tokens, generated_share=generated_share, mixed=text == "mixed")


def refit_tokens(config) -> int:
    """How many tokens a refit reads: it holds four float32 streams of them, and the inputs of one down_proj."""
    bytes_per_token = 4 * (4 * config.hidden_size + config.intermediate_size)
    return min(REFIT_TOKENS, int(REFIT_BYTES / bytes_per_token))


@torch.inference_mode()
def watch_inputs(run: Callable[[], None], layers: Iterable[torch.nn.Module], take: Callable[[int, torch.Tensor], None]) -> None:
    """Call `take(index, x)` with what reaches each of `layers` while `run()` runs, x float32 [tokens, K]."""

    def watch(index: int):
        return lambda _module, inputs: take(index, inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float())

    handles = [layer.register_forward_pre_hook(watch(index)) for index, layer in enumerate(layers)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()


def second_moments(run: Callable[[], None], layers: list[torch.nn.Module]) -> list[torch.Tensor]:
    """Mean of x x^T over all tokens that reach each of `layers` while `run()` runs: float32 [K, K] each, in order."""
    sums, counts = [0.0] * len(layers), [0] * len(layers)

    def take(index: int, x: torch.Tensor) -> None:
        sums[index] = sums[index] + x.T @ x
        counts[index] += len(x)

    watch_inputs(run, layers, take)
    return [total / count for total, count in zip(sums, counts, strict=True)]
