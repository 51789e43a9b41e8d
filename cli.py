"""The flags every script shares, spelled as in llama-bench where it has them, checked before a model is loaded."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path

import torch

import devices
import models
from arguments import Parser, fail, int_list, ratio
from benchmark import Workload

QUICK = {"new_tokens": 10, "repeats": 6, "quality_windows": 4, "quality_window": 256, "continuation_tokens": 12,
         "draft_pairs": 1}  # fmt: skip
DEFAULTS = Workload()
# Flags that would do nothing in a script that times nothing, and in one that scores no recipes either.
OF_TIMING = ("--batch-size", "--repeats", "--precision", "--budget-s", "--prompts-file", "--json")
OF_RECIPES = (*OF_TIMING, "--prompt-tokens", "--new-tokens", "--depth", "--text-file", "--quality-windows", "--quality-window",
              "--quick", "--seed", "--resume")  # fmt: skip


def build_parser(docstring: str, *, without: Iterable[str] = ()) -> argparse.ArgumentParser:
    """A parser whose `--help` opens with the script's own docstring and ends with the shared flags.

    `without` names those that would do nothing in a script: they keep their defaults and are refused.
    """
    parser = Parser(docstring)
    parser.set_defaults(runs_workload=not set(OF_RECIPES) <= set(without))
    shared = parser.add_argument_group("model and machine")
    shared.add_argument("--model", "-m", default="auto", metavar="MODEL",
        help="auto | tinyllama | smollm2-135m | tinyllama-random | <hub id> | <folder> | <file.gguf> (default: auto, TinyLlama "
        "where it is cached or reachable, else the embedded SmolLM2-135M)")  # fmt: skip
    shared.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="default: cuda, mps, cpu")
    shared.add_argument("--threads", "-t", type=int, default=None, help="CPU threads (default: all physical cores)")
    add = _adder(parser, "workload", without)
    add("--prompt-tokens", "-p", type=int, help=f"default: {DEFAULTS.prompt_tokens}")
    add("--new-tokens", "-n", type=int, help=f"default: {DEFAULTS.new_tokens}")
    add("--depth", "-d", type=int_list, metavar="D[,D...]",
        help="tokens in the cache before the prompt; the first is the main workload, others a chart (default: 0)")  # fmt: skip
    add("--batch-size", "-b", type=int_list, metavar="B[,B...]",
        help="sequences at once; others in the record and the KV-cache chart (default: 1)")  # fmt: skip
    add("--repeats", "-r", type=int, help=f"least interleaved pairs (default: {DEFAULTS.repeats})")
    add("--precision", type=ratio, default=0.02,
        help="go on until the speed-up's interval lies within +- this share of it (default: %(default)s)")  # fmt: skip
    add("--budget-s", type=float, help="... or until a recipe has taken this long (default: 10, with --quick 4)")
    add("--prompts-file", metavar="FILE", help="your own prompts, one a line")
    add("--text-file", metavar="FILE", help="your own evaluation text (UTF-8)")
    add("--quality-windows", type=int, help=f"default: {DEFAULTS.quality_windows}")
    add("--quality-window", type=int, help=f"tokens a window (default: {DEFAULTS.quality_window})")
    add("--quick", action="store_true", default=False, 
        help="a few minutes: fewer tokens, pairs and windows; run_optimization.py then rounds int4 to nearest")  # fmt: skip
    add("--seed", type=int, default=0)
    add = _adder(parser, "output", without)
    add("--results-dir", "-o", default="results", metavar="DIR", help="default: results")
    add("--resume", action=argparse.BooleanOptionalAction, default=True,
        help="skip recipes that were finished here with the same options, code and machine (default: yes)")  # fmt: skip
    add("--json", action="store_true", default=False, help="one line of JSON on stdout instead of the table")
    return parser


def _adder(parser: argparse.ArgumentParser, title: str, without: Iterable[str]):
    group = parser.add_argument_group(title)

    def add(flag: str, *short: str, default=None, **options) -> None:
        if flag in without:
            parser.set_defaults(**{flag.removeprefix("--").replace("-", "_"): default})
        else:
            group.add_argument(flag, *short, default=default, **options)

    return add


def parse(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check. Adds `source`, `config`, `torch_device`, `workload` and `prompts` to the namespace.

    Anything wrong ends here: one sentence on stderr, exit code 2, no weights loaded.
    """
    args = parser.parse_args(argv)
    try:
        depths, batch_sizes = args.depth or [DEFAULTS.depth], args.batch_size or [DEFAULTS.batch_size]
        args.workload = make_workload(args, depth=depths[0], batch_size=batch_sizes[0])
        if min(batch_sizes) < 1:
            raise ValueError(f"--batch-size {min(batch_sizes)}: choose 1 or more")
        args.axes = list(itertools.product(depths, batch_sizes))[1:]
        if args.budget_s is None:
            args.budget_s = 4.0 if args.quick else 10.0
        if not args.budget_s > 0:
            raise ValueError(f"--budget-s {args.budget_s:g}: choose a number of seconds above 0")
        args.prompts = read_prompts(args.prompts_file)
        if args.text_file is not None:
            from texts import load_text

            load_text(text_file=args.text_file)
        if args.threads is not None and not 1 <= args.threads <= (os.cpu_count() or 1):
            raise ValueError(f"--threads {args.threads}: choose 1 to {os.cpu_count()}")
        args.torch_device = devices.pick_device(args.device)
        args.source = models.find_model(args.model)
        for flag, given in (("--text-file", args.text_file), ("--prompts-file", args.prompts_file)):
            if given and args.source.random_weights:
                raise ValueError(f"{flag}: {args.source.name} has random weights and reads no text; choose a real model")
        args.config = models.load_config(args.source)
        if args.runs_workload:
            check_positions(args)
        check_results_dir(Path(args.results_dir))  # last: a mistake in another flag leaves no empty folder
    except ValueError as error:
        fail(parser, error)
    except KeyboardInterrupt:  # while a Hub was asked, or a file hashed
        print("interrupted before anything was measured", file=sys.stderr)
        raise SystemExit(130) from None
    args.threads = args.threads or devices.default_threads()
    torch.set_num_threads(args.threads)
    if args.source.notice:
        print(f"NOTE  {args.source.notice}", file=sys.stderr)
    return args


def check_positions(args: argparse.Namespace) -> None:
    """Raises ValueError if a sequence would be longer than the model's positions."""
    limit, work = args.config.max_position_embeddings, args.workload
    deepest = max([work.depth, *(depth for depth, _ in args.axes)])
    longest = deepest + work.prompt_tokens + work.new_tokens
    if longest > limit:
        raise ValueError(f"--depth + --prompt-tokens + --new-tokens is {longest}: {args.source.name} has {limit} positions")
    if work.quality_window > limit and not args.source.random_weights:
        raise ValueError(f"--quality-window {work.quality_window}: {args.source.name} has {limit} positions")


def make_workload(args: argparse.Namespace, **axes: int) -> Workload:
    """The workload of `--quick` or of the defaults, with the flags the user gave on top. ValueError below 1."""
    workload = replace(DEFAULTS, **(QUICK if args.quick else {}))
    names = {field.name for field in fields(Workload)}
    given = {name: value for name, value in vars(args).items() if name in names and value is not None} | axes
    for name, value in given.items():
        least = {"depth": 0, "seed": 0, "quality_window": 2}.get(name, 1)
        if value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value}: choose {least} or more")
    return replace(workload, **given)


def read_prompts(prompts_file: str | None) -> list[str] | None:
    if prompts_file is None:
        return None
    try:
        lines = Path(prompts_file).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts-file {prompts_file}: cannot be read as UTF-8 text ({error})") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts-file {prompts_file}: no prompt in it (one a line)")
    return prompts


def check_results_dir(folder: Path) -> None:
    """Raises ValueError if nothing can be written there: better now than after the measurements."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--results-dir {folder}: cannot be written ({error.strerror})") from None
