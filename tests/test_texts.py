"""What is learnt from and what is judged on never meet, and calibration does without what a Python lacks."""

import sys
from types import SimpleNamespace

import pytest

import texts


@pytest.fixture
def carried(monkeypatch):
    """No wikitext; news and encyclopaedia stand in for what the carrier package has."""
    monkeypatch.setattr(texts, "_wikitext", lambda part: None)
    monkeypatch.setattr(texts, "_lee_news", lambda part: texts.Text("news", f"{part} news"))
    monkeypatch.setattr(texts, "_wikipedia", lambda: texts.Text("encyclopaedia", "articles"))
    monkeypatch.setattr(texts, "_newsgroups", lambda: texts.Text("newsgroups", "postings"))


@pytest.mark.embedded
def test_evaluation_text_is_no_calibration_text(embedded_source, monkeypatch):
    monkeypatch.setattr(texts, "_wikitext", lambda part: None)
    evaluation = texts.load_text("evaluation")
    learnt = "\n".join(text.content for text in texts.calibration_texts())
    documents = evaluation.content.splitlines()
    assert len(documents) == 100 and not any(document in learnt for document in documents)
    assert len(texts.load_text("calibration").content.splitlines()) == 200


@pytest.mark.embedded
def test_openings_of_articles_are_plain_prose(embedded_source):
    text = texts._wikipedia().content
    assert text.startswith("Anarchism is a political philosophy that advocates self-governed societies")
    assert 130_000 < len(text) < 150_000 and "\n\nAutism is a neurodevelopmental disorder" in text
    assert not any(mark in text for mark in ("[[", "{{", "<ref", "thumb|", "=="))


@pytest.mark.embedded
def test_postings_are_what_people_wrote_and_nothing_is_unpickled(embedded_source, monkeypatch):
    import pickle

    monkeypatch.setattr(pickle, "Unpickler", None)
    monkeypatch.setattr(pickle, "loads", None)
    text = texts._newsgroups.__wrapped__().content
    assert 200_000 < len(text) < 225_000 and "Nope, I've answered each question posed" not in text  # too short
    assert "\n\nObviously, we have different sources. Bill Moyers (who happens to be a theist," in text  # lines are joined
    assert "\n>" not in text and text.count("Message-ID:") == 1  # of 200 headers; one man quotes one to another


def test_four_kinds(carried):
    news, encyclopaedia, newsgroups, reference = texts.calibration_texts()
    assert (news.content, encyclopaedia.content, newsgroups.content) == ("calibration news", "articles", "postings")
    assert reference.name == f"language reference of Python {sys.version_info.major}.{sys.version_info.minor}"
    assert 'The "assert" statement' in reference.content and len(reference.content) > 100_000


def test_wikitext_is_encyclopaedia_enough(carried, monkeypatch):
    """Articles of the carried dump could be among those that wikitext's evaluation part has."""
    monkeypatch.setattr(texts, "_wikitext", lambda part: texts.Text(f"wikitext {part}", "articles"))
    assert [text.name for text in texts.calibration_texts()][:1] == ["wikitext calibration"]
    assert len(texts.calibration_texts()) == 2


def test_a_python_without_its_reference(carried, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert [text.name for text in texts.calibration_texts()] == ["news", "encyclopaedia", "newsgroups"]


def test_one_run_has_one_choice_of_texts(monkeypatch):
    """Found once, wikitext is asked for until it is there or the recipe fails; not found, it is not looked for again."""
    text, asked = texts.Text("wikitext", "articles"), []
    monkeypatch.setattr(texts, "_load_wikitext", lambda part: asked.append(part) or answers.pop(0))
    monkeypatch.setattr(texts, "_wikitext_is_there", None)
    answers = [text, None]
    assert texts._wikitext("evaluation") is text and texts.wikitext_is_there() is True
    with pytest.raises(ValueError, match="no longer"):
        texts._wikitext("calibration")
    texts.settle_wikitext(False)
    assert texts._wikitext("calibration") is None and asked == ["evaluation", "calibration"]


def test_the_parts_of_wikitext(monkeypatch):
    """Judged on its test part, learnt from its training part."""
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *_, split: {"text": [split]}))
    monkeypatch.setattr(texts, "_wikitext_cached", lambda: True)
    assert [texts._load_wikitext.__wrapped__(part).content for part in ("evaluation", "calibration")] == ["test", "train"]
