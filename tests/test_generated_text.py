"""Calibration text of the model's own: drawn from the model's distribution, the same every time, written once."""

from types import SimpleNamespace

import pytest
import torch

import calibration
import models
import texts
from kernels import calibration_cache, generated_text


@pytest.fixture
def model(tiny, monkeypatch, tmp_path):
    """A tiny model with a tokenizer of one token a word, 5 windows of calibration text, and windows of 16 tokens."""
    monkeypatch.setattr(calibration_cache, "ROOT", tmp_path / "calibration")
    monkeypatch.setattr(calibration, "WINDOW", 16)
    monkeypatch.setattr(generated_text, "WINDOWS", 4)
    monkeypatch.setattr(texts, "load_text", lambda part: texts.Text(part, "word " * 80))
    tokenizer = lambda text, **_: SimpleNamespace(input_ids=[7] * len(text.split()))  # noqa: E731
    tokenizer.bos_token_id, tokenizer.eos_token_id = None, 3
    monkeypatch.setattr(models, "load_tokenizer", lambda source: tokenizer)
    model = tiny("grouped")
    model.source = models.ModelSource("tiny", "folder", "")
    return model


def test_words_follow_the_models_distribution(tiny):
    """3000 first tokens against the model's own probabilities: total variation as small as chance makes it."""
    model = tiny("grouped")
    model.lm_head.weight.data *= 20  # else all tokens are about as likely
    beginnings = torch.full((3000, 1), 3)
    with torch.inference_mode():
        expected = model(beginnings[:1]).logits[0, -1].softmax(-1)
    counts = torch.bincount(generated_text.write(model, beginnings, window=2)[:, 1], minlength=len(expected)) / 3000
    assert (counts - expected).abs().sum() / 2 < 0.08 < (1 / len(expected) - expected).abs().sum() / 2


def test_cached_steps_draw_what_whole_passes_would(tiny):
    """Each token depends on all before it: a confident model's text is its greedy continuation."""
    model = tiny("grouped")
    model.lm_head.weight.data *= 1e4
    written = generated_text.write(model, torch.tensor([[3], [5]]), window=12)
    with torch.inference_mode():
        assert torch.equal(model(written).logits[:, :-1].argmax(-1), written[:, 1:])


@pytest.mark.parametrize(("share", "own"), [(0.0, 0), (0.5, 3), (1.0, 4)])
def test_share_of_windows(model, share, own):
    """6 windows asked for: as many of the model's own as the share says and there are, the others text, none twice."""
    windows = calibration.calibration_ids(model, tokens=6 * 16, generated_share=share)
    text = (windows == 7).all(1)
    assert windows.shape == (min(6 - own, 5) + own, 16) and int((~text).sum()) == own
    assert (windows[~text][:, 0] == 3).all()


def test_written_once_and_before_the_model_changes(model, monkeypatch):
    first = generated_text.generated_windows(model, 3, window=16)
    monkeypatch.setattr(generated_text, "write", None)
    model.lm_head.weight.data *= 2
    assert torch.equal(generated_text.generated_windows(model, 3, window=16), first)  # a stack shares the dense model's
    model.lm_head.weight.data /= 2
    del model.generated_windows
    assert torch.equal(generated_text.generated_windows(model, 3, window=16), first)  # from the disk


def test_pruning_refits_on_real_text_and_recovers_on_some_of_the_models_own(model, monkeypatch):
    shares = []
    monkeypatch.setattr(calibration, "calibration_ids", lambda _, *, tokens, generated_share: shares.append(generated_share))
    calibration.refit_windows(model)
    calibration.healing_windows(model)
    assert shares == [0, 0.25]
