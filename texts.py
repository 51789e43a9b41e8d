"""The text that quality is measured on, and the text that techniques may calibrate on: never the same.

wikitext-2-raw through `datasets` where it is cached or reachable; else the Lee news corpus (300 short documents,
carried by the package gensim): its first 200 documents are calibration, the last 100 evaluation. What is learnt from one
kind of text holds for little else, so calibration has three more: the openings of a hundred Wikipedia articles and what 200
people wrote in newsgroups, from the same package, and Python's language reference, which every Python carries.
"""

from __future__ import annotations

import bz2
import functools
import hashlib
import os
import pickletools
import re
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from models import carried_file

LEE_CORPUS = ("gensim", "gensim/test/test_data/lee_background.cor")
LEE_SHA256 = "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb"
LEE_CALIBRATION_DOCUMENTS = 200
WIKIPEDIA = ("gensim", "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2")
WIKIPEDIA_SHA256 = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
NEWSGROUPS = ("gensim", "gensim/test/test_data/mini_newsgroup")
NEWSGROUPS_SHA256 = "be0084ee9aded5eeefabea86bd23f0e5e3a743d9c1875aa1e47bc0728d6a5311"
QUOTED = re.compile(r"^(\s*(\w{0,3}>|[#|:}])|In article|From article|.*(writes|wrote|said):\s*$).*\n?", re.MULTILINE)
SIGNATURE = re.compile(r"\n--+ *\n.*", re.DOTALL)
LONG_LINE = 120  # characters: nobody writes so many again by chance
ASIDE = re.compile(r"<!--.*?-->|<ref[^<>]*/>|<ref.*?</ref>", re.DOTALL)  # comments and footnotes


@dataclass(frozen=True)
class Text:
    """One text with the name that records show for it."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()


def load_text(part: str = "evaluation", *, text_file: str | None = None) -> Text:
    """`evaluation` or `calibration` text. Raises ValueError, naming the flag, if there is none to be had.

    `text_file` replaces the evaluation text; calibration text stays what it is, see `check_apart`.
    """
    if part not in ("evaluation", "calibration"):
        raise ValueError(f"unknown part {part!r}: choose evaluation or calibration")
    if text_file is not None and part == "evaluation":
        return _read_text_file(text_file)
    wikitext = _wikitext(part)
    return wikitext if wikitext is not None else _lee_news(part)


def check_apart(text: Text) -> None:
    """Raises ValueError, naming the flag, where a long line of the user's `text` is in one that techniques may learn from."""
    lines = {line.strip() for line in text.content.splitlines()}
    for known in calibration_texts():
        shared = [line for line in known.content.splitlines() if len(line) >= LONG_LINE and line.strip() in lines]
        if shared:
            raise ValueError(
                f"--text-file {text.name}: {len(shared)} lines of it are calibration text ({known.name}), which would flatter "
                "techniques that learnt from it; choose another text"
            )


def calibration_texts() -> list[Text]:
    """All that techniques may learn from, four kinds: the carried encyclopaedia, news and newsgroups, this Python's reference.

    Where wikitext is at hand, its training part stands for the first three: Wikipedia's articles might be those that its
    evaluation part has, and a real encyclopaedia's worth of text needs no carriers.
    """
    wikitext = _wikitext("calibration")
    english = [wikitext] if wikitext is not None else [_lee_news("calibration"), _wikipedia(), _newsgroups()]
    return [*english, *_python_reference()]


@functools.cache
def _wikipedia() -> Text:
    """What each article of the carried dump says before its first heading, as plain text."""
    import mwparserfromhell

    openings = []
    with bz2.open(carried_file(*WIKIPEDIA, sha256=WIKIPEDIA_SHA256)) as dump:
        for _, element in ElementTree.iterparse(dump):
            if element.tag.endswith("}text"):
                opening = ASIDE.sub("", (element.text or "").split("\n==", 1)[0])
                markup = mwparserfromhell.parse(opening)
                for picture in markup.filter_wikilinks(matches=lambda link: link.title.startswith(("File:", "Image:"))):
                    markup.remove(picture)
                openings.append(str(markup.strip_code(normalize=True, collapse=True)).strip())
                element.clear()
    return Text("openings of Wikipedia articles", "\n\n".join(text for text in openings if len(text) > 200))


@functools.cache
def _newsgroups() -> Text:
    """What people wrote to each other, without headers, quotations and signatures, each paragraph on one line.

    The file is a pickle, and is not unpickled: a disassembler, which builds and runs nothing, lists the strings in it.
    """
    packed = zlib.decompress(carried_file(*NEWSGROUPS, sha256=NEWSGROUPS_SHA256).read_bytes())
    strings = (value for opcode, value, _ in pickletools.genops(packed) if opcode.name == "UNICODE")
    bodies = (SIGNATURE.sub("", string.partition("\n\n")[2]) for string in strings)
    written = (re.sub(r"(?<=\S) *\n(?=\S)", " ", QUOTED.sub("", body)).strip() for body in bodies)
    return Text("postings to newsgroups", "\n\n".join(text for text in written if len(text) > 200))


def _python_reference() -> list[Text]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        return []
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return [Text(f"language reference of Python {version}", "\n\n".join(topics.values()))]


def _read_text_file(text_file: str) -> Text:
    path = Path(text_file).expanduser()
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--text-file {text_file}: cannot be read as UTF-8 text ({error})") from None
    if not content.strip():
        raise ValueError(f"--text-file {text_file}: the file is empty")
    return Text(path.name, content)


_wikitext_is_there: bool | None = None  # once it was asked for, or the process that started this one had asked


def wikitext_is_there() -> bool | None:
    """What this process found; None where it never had to look."""
    return _wikitext_is_there


def settle_wikitext(is_there: bool | None) -> None:
    """One run, one choice of texts: a worker takes what the run found, though the network has come or gone since."""
    global _wikitext_is_there
    _wikitext_is_there = is_there


def _wikitext(part: str) -> Text | None:
    """wikitext-2-raw, or None where it is neither cached nor reachable. ValueError where it was there before, and is gone."""
    found = _load_wikitext(part) if _wikitext_is_there is not False else None
    if found is None and _wikitext_is_there:
        raise ValueError("wikitext-2, which this run is measured on, can no longer be read: try again")
    settle_wikitext(found is not None)
    return found


@functools.cache
def _load_wikitext(part: str) -> Text | None:
    """Joined as in the GPTQ and Wanda papers."""
    import socket
    from urllib.parse import urlparse

    from huggingface_hub import constants

    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")
    if not offline:
        try:
            socket.getaddrinfo(urlparse(constants.ENDPOINT).hostname, 443)
        except OSError:
            offline = True
    if offline and not _wikitext_cached():
        return None  # importing `datasets` takes seconds, and its own retries a minute: ask only where it can answer
    try:
        import datasets

        split = {"evaluation": "test", "calibration": "train"}[part]
        lines = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)["text"][:20_000]
    except Exception:  # the loader raises a dozen kinds when a server is unreachable; the fallback is the answer to all
        return None
    return Text(f"wikitext-2-raw {split}", "\n\n".join(lines))


def _wikitext_cached() -> bool:
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cache = Path(os.environ.get("HF_DATASETS_CACHE", home / "datasets"))
    return any(cache.glob("*wikitext*"))


def _lee_news(part: str) -> Text:
    path = carried_file(*LEE_CORPUS, sha256=LEE_SHA256)
    documents = path.read_text(encoding="utf-8").splitlines()
    if part == "calibration":
        name, chosen = "Lee news corpus, documents 1-200", documents[:LEE_CALIBRATION_DOCUMENTS]
    else:
        name, chosen = "Lee news corpus, documents 201-300", documents[LEE_CALIBRATION_DOCUMENTS:]
    return Text(name, "\n".join(chosen))
