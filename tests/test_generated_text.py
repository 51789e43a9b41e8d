"""Calibration text of the model's own: drawn from the model's distribution, the same every time, written once."""

from types import SimpleNamespace

import pytest
import torch

import models
import texts
from fitting import calibration, calibration_cache, generated_text


@pytest.fixture
def model(tiny, monkeypatch, tmp_path):
    """A tiny model, a tokenizer that reads numbers, and texts of 11 and of 2 windows of 16 tokens: all 7 and all 8."""
    monkeypatch.setattr(calibration_cache, "ROOT", tmp_path / "calibration")
    monkeypatch.setattr(calibration, "WINDOW", 16)
    monkeypatch.setattr(generated_text, "WINDOWS", 4)
    monkeypatch.setattr(texts, "calibration_texts", lambda: [texts.Text("long", "7 " * 180), texts.Text("short", "8 " * 35)])
    tokenizer = lambda text, **_: SimpleNamespace(input_ids=[int(word) for word in text.split()])  # noqa: E731
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


def test_tokens_of_a_gguf_file_are_kept(model, monkeypatch, tmp_path):
    """Its tokenizer is made once; another file, or other words, have tokens of their own."""
    file, made, real = tmp_path / "a.gguf", [], models.load_tokenizer
    monkeypatch.setattr(models, "load_tokenizer", lambda source: made.append(source.name) or real(source))
    monkeypatch.setattr(texts, "load_text", lambda part: texts.Text("news", "5 " * 40))
    file.write_bytes(b"one")
    model.source = models.ModelSource("one", "gguf", str(file))
    first = calibration.calibration_ids(model, tokens=64, generated_share=0.5)
    assert torch.equal(calibration.calibration_ids(model, tokens=64, generated_share=0.5), first)
    assert made == ["one"] and int((first[:, 0] == 3).sum()) == 2
    assert calibration._tokenised([texts.load_text("calibration")], model.source)[1] == 3, "from the disk, too"
    file.write_bytes(b"two")
    calibration.calibration_ids(model, tokens=64)
    monkeypatch.setattr(texts, "load_text", lambda part: texts.Text("news", "6 " * 40))
    assert (calibration.calibration_ids(model, tokens=64) == 6).all()
    assert made == ["one"] * 3


@pytest.mark.parametrize(
    ("tokens", "share", "own", "long", "short"),
    [(6, 0.0, 0, 4, 2), (3, 0.0, 0, 1, 2), (6, 0.5, 3, 1, 2), (6, 1.0, 4, 1, 1), (99, 0.0, 0, 11, 2), (0, 0.0, 0, 0, 1)],
)
def test_share_of_windows(model, tokens, share, own, long, short):
    """As many of the model's own as the share says and there are; the others equally of both texts, as far as each goes."""
    windows = calibration.calibration_ids(model, tokens=tokens * 16, generated_share=share, mixed=True)
    of = {word: int((windows == word).all(1).sum()) for word in (7, 8)}
    assert windows.shape == (own + long + short, 16) and of == {7: long, 8: short}
    assert int((windows[:, 0] == 3).sum()) == own


def test_kinds_of_text_take_turns(model):
    """Who takes the first few gets some of each, as far as there is as much of each."""
    assert calibration.calibration_ids(model, tokens=4 * 16, mixed=True)[:, 0].tolist() == [8, 7, 8, 7]
    order = calibration.calibration_ids(model, tokens=99 * 16, mixed=True)[:, 0] == 8
    assert len(order) == 13 and order.nonzero()[:, 0].tolist() == [3, 9]


def test_a_few_windows_are_of_all_kinds_and_from_everywhere(model, monkeypatch):
    """Four kinds of 25 windows, numbered: the first 4 are one of each, the first 16 four of each, from all quarters of it."""
    numbered = [" ".join(str(kind * 25 + place) for place in range(25) for _ in range(16)) for kind in range(4)]
    monkeypatch.setattr(texts, "calibration_texts", lambda: [texts.Text(str(i), words) for i, words in enumerate(numbered)])
    numbers = calibration.calibration_ids(model, tokens=100 * 16, mixed=True)[:, 0]
    assert sorted(numbers.tolist()) == list(range(100))
    assert sorted((numbers[:4] // 25).tolist()) == [0, 1, 2, 3]
    for kind in range(4):
        places = numbers[:16][numbers[:16] // 25 == kind] % 25
        assert sorted((places * 4 // 25).tolist()) == [0, 1, 2, 3]


def test_text_shorter_than_a_window(model, monkeypatch):
    monkeypatch.setattr(texts, "calibration_texts", lambda: [texts.Text("short", "7 " * 15)])
    with pytest.raises(ValueError, match="fewer tokens than one window of 16"):
        calibration.calibration_ids(model, tokens=160, mixed=True)


def test_written_once_and_before_the_model_changes(model, monkeypatch):
    first = generated_text.generated_windows(model, 3, window=16)
    monkeypatch.setattr(generated_text, "write", None)
    model.lm_head.weight.data *= 2
    assert torch.equal(generated_text.generated_windows(model, 3, window=16), first)  # a stack shares the dense model's
    model.lm_head.weight.data /= 2
    del model.generated_windows
    assert torch.equal(generated_text.generated_windows(model, 3, window=16), first)  # from the disk


def test_pruning_refits_on_real_text_and_recovers_on_some_of_the_models_own(model, monkeypatch):
    asked = []
    monkeypatch.setattr(
        calibration, "calibration_ids", lambda _, *, tokens, generated_share, mixed: asked.append((generated_share, mixed))
    )
    calibration.refit_windows(model)
    calibration.healing_windows(model)
    calibration.refit_windows(model, "evaluated")
    assert asked == [(0, True), (0.25, True), (0, False)]


def test_who_learns_asks_for_calibration_text(model, monkeypatch):
    asked = []
    monkeypatch.setattr(texts, "load_text", lambda part="evaluation", **_: asked.append(part) or texts.Text(part, "7 " * 180))
    calibration.calibration_ids(model, tokens=64)
    assert asked == ["calibration"]
