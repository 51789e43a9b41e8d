"""What is learnt from and what is judged on never meet, and calibration does without what a Python lacks."""

import sys

import pytest

import texts


@pytest.fixture
def news(monkeypatch):
    """Stands for the text that calibration shares with nothing else."""
    monkeypatch.setattr(texts, "load_text", lambda part: texts.Text(part, f"{part} news"))


@pytest.mark.embedded
def test_evaluation_text_is_no_calibration_text(embedded_source, monkeypatch):
    monkeypatch.setattr(texts, "_wikitext", lambda part: None)
    evaluation = texts.load_text("evaluation")
    learnt = "\n".join(text.content for text in texts.calibration_texts())
    documents = evaluation.content.splitlines()
    assert len(documents) == 100 and not any(document in learnt for document in documents)
    assert len(texts.load_text("calibration").content.splitlines()) == 200


def test_the_reference_is_a_second_kind(news):
    first, second = texts.calibration_texts()
    assert first.content == "calibration news"
    assert second.name == f"language reference of Python {sys.version_info.major}.{sys.version_info.minor}"
    assert 'The "assert" statement' in second.content and len(second.content) > 100_000


def test_a_python_without_its_reference(news, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert [text.name for text in texts.calibration_texts()] == ["calibration"]
