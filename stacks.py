"""A stack of techniques spelled in one line, as `--stack` takes it and as a search prints what it found.

    head_pruning:method=calibrated,prune_ratio=0.25 + int4:max_bits=6 + lean_decode

Techniques are files in optimizations/, joined by + in the order they are applied; options are keywords of `apply`, and a
value takes the type of its default. A part after a comma that is no `option=value` belongs to the value before it, so that
lists need no quotes: int4:int8_layers=lm_head,down_proj,max_bits=6.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from records import defaults_of

Steps = list[tuple[str, dict]]

# What may follow what: prune -> precision or quantised weights -> KV cache -> the lean pass -> drafts checked by it.
ORDER = ("head_pruning", "mlp_pruning", "layer_pruning", "smoothing", "mixed_precision", "quantization", "int4",
         "kv_cache_quant", "lean_decode", "prompt_lookup")  # fmt: skip
ONE_OF = ("mixed_precision", "quantization", "int4")  # each wants the matrices as they came
LONGEST_NAME = 120  # characters; a file is named after a stack


def techniques() -> list[str]:
    """The names in optimizations/."""
    folder = Path(__file__).parent / "optimizations"
    return sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")


def parse_stack(text: str) -> Steps:
    """The steps that `text` spells. Raises ValueError, in one sentence, for what does not exist or stands in a wrong order."""
    steps = [_parse_step(part.strip()) for part in text.split("+")]
    places = [ORDER.index(technique) for technique, _ in steps if technique in ORDER]
    if places != sorted(set(places)):
        raise ValueError(f"--stack {text!r}: each technique once, in the order {', '.join(ORDER)}")
    if sum(technique in ONE_OF for technique, _ in steps) > 1:
        raise ValueError(f"--stack {text!r}: choose one of {', '.join(ONE_OF)}")
    return steps


def spell(steps: Steps) -> str:
    """The line that `parse_stack` reads as `steps`; options that have their default's value are left out."""
    parts = []
    for technique, options in steps:
        defaults = defaults_of(technique)
        chosen = [f"{key}={_spelled(value)}" for key, value in options.items() if value != defaults[key]]
        parts.append(technique + (":" + ",".join(chosen) if chosen else ""))
    return " + ".join(parts)


def file_name(text: str) -> str:
    """A recipe's name for a spelled stack: letters that every file system takes, and not too many."""
    name = re.sub(r"[^\w.+=,-]", "-", text.replace(" ", ""))
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _parse_step(part: str) -> tuple[str, dict]:
    technique, colon, listed = (piece.strip() for piece in part.partition(":"))
    if technique not in techniques():
        raise ValueError(f"--stack {technique!r}: choose from {', '.join(techniques())}")
    defaults = defaults_of(technique)
    texts: dict[str, str] = {}
    for item in listed.split(",") if colon else []:
        key, equals, value = (piece.strip() for piece in item.partition("="))
        if equals:
            texts[key] = value
        elif texts:
            texts[next(reversed(texts))] += f",{key}"
        else:
            raise ValueError(f"--stack {part!r}: write {technique}:option=value")
    for key in texts:
        if key not in defaults:
            raise ValueError(f"--stack {technique}:{key}: its options are {', '.join(defaults) or 'none at all'}")
    return technique, {key: _typed(value, defaults[key], f"{technique}:{key}") for key, value in texts.items()}


def _typed(text: str, default, where: str):
    """`text` as the type of `default`; where that is None, a number or `none`."""
    if default is None and text == "none":
        return None
    kind = float if default is None else type(default)
    try:
        return {"true": True, "false": False}[text] if kind is bool else kind(text)
    except (ValueError, KeyError):
        wanted = {bool: "true or false", int: "a whole number"}.get(kind, "a number")
        raise ValueError(f"--stack {where}={text}: choose {wanted}") from None


def _spelled(value) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
