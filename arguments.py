"""How every script reads its command line: what is wrong with it is one sentence and exit code 2.

No PyTorch here: scripts that only read results start at once.
"""

from __future__ import annotations

import argparse
import functools
import sys


class Parser(argparse.ArgumentParser):
    """Its `--help` opens with the script's own docstring. What argparse finds wrong is said like everything else: one sentence,
    without the usage before it."""

    def __init__(self, docstring: str):
        formatter = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=28, width=110)
        super().__init__(description=docstring, formatter_class=formatter)

    def error(self, message: str):
        fail(self, ValueError(f"{message.removeprefix('argument ')} (--help lists all flags)"))


def fail(parser: argparse.ArgumentParser, error: Exception) -> None:
    """One sentence, exit code 2."""
    print(f"{parser.prog}: {' '.join(str(error).split())}", file=sys.stderr)
    raise SystemExit(2)


def without_flags(argv: list[str], *names: str) -> list[str]:
    """`argv` without these flags, which take a value each: spelled out or shortened, the value after them or after `=`."""
    kept, skip = [], False
    for word in argv:
        flag, equals, _ = word.partition("=")
        dropped = not skip and len(flag) > 2 and any(name.startswith(flag) for name in names)
        if not skip and not dropped:
            kept.append(word)
        skip = dropped and not equals
    return kept


def int_list(text: str) -> list[int]:
    """An argparse type: whole numbers separated by commas, none negative."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 0,512,1536") from None
    if min(values) < 0:
        raise argparse.ArgumentTypeError(f"{text} holds a negative number")
    return values


def ratio(text: str) -> float:
    """An argparse type: a number strictly between 0 and 1."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1") from None
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not strictly between 0 and 1")
    return value
