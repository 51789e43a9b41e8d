"""What the scripts of the three peers share: flags, one measured peer in a process of its own, one record written."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

import cli
import devices
import inputs
import judgement
import models
import records
from arguments import Parser, fail
from benchmark import Workload
from measurement import console
from peers import contenders
from peers.build_models import CACHE, MODEL
from peers.contenders import ENGINES, Peer, PeerJob, PeerProcess
from store import validate
from worker import RecipeError

DEFAULT_PYTHON = Path(".venv-peers/bin/python")


def build_parser(docstring: str) -> argparse.ArgumentParser:
    """The flags of the three scripts and of the comparison."""
    parser = Parser(docstring)
    parser.add_argument("--model-dir", type=Path, default=CACHE, metavar="DIR",
        help="where converted models are kept; built there if missing (default: %(default)s)")  # fmt: skip
    parser.add_argument("--peers-python", type=Path, default=DEFAULT_PYTHON, metavar="FILE",
        help="Python of the environment made from peers/requirements.txt (default: %(default)s)")  # fmt: skip
    parser.add_argument("--prompt-tokens", "-p", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--new-tokens", "-n", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--threads", "-t", type=int, default=None, help="default: all physical cores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--results-dir", "-o", type=Path, default=Path("results/peers"), metavar="DIR", help="default: %(default)s"
    )
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parse and check; adds `workload` and `prompt_ids`. Bad arguments: one sentence, exit code 2."""
    args = parser.parse_args(argv)
    try:
        for flag in ("prompt_tokens", "new_tokens", "repeats"):
            if getattr(args, flag) < 1:
                raise ValueError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: choose 1 or more")
        if args.threads is not None and not 1 <= args.threads <= (os.cpu_count() or 1):
            raise ValueError(f"--threads {args.threads}: choose 1 to {os.cpu_count()}")
        limit = models.TINYLLAMA_SHAPE["max_position_embeddings"]
        if args.prompt_tokens + args.new_tokens > limit:
            raise ValueError(
                f"--prompt-tokens + --new-tokens is {args.prompt_tokens + args.new_tokens}: choose at most {limit}"
            )
        cli.check_results_dir(args.results_dir)
    except ValueError as error:
        fail(parser, error)
    args.threads = args.threads or devices.default_threads()
    args.workload = Workload(
        prompt_tokens=args.prompt_tokens, new_tokens=args.new_tokens, repeats=args.repeats, seed=args.seed
    )  # fmt: skip
    args.axes, args.source = [], models.find_model(MODEL)
    args.config = models.load_config(args.source)
    args.inputs = inputs.prepare(None, args, vocab_size=args.config.vocab_size)
    return args


def repro(script: str, argv: list[str]) -> str:
    """The command, without where this machine keeps its environment and its models."""
    kept, places = [], ("--peers-python", "--model-dir")
    for position, flag in enumerate(argv):
        if not flag.startswith(places) and (position == 0 or argv[position - 1] not in places):
            kept.append(flag)
    return shlex.join(["python", script, *kept])


def main(engine: str, docstring: str, argv: list[str] | None = None) -> int:
    """Measure one peer alone and write its record. Exit codes: 0 measured or unsupported, 1 failed, 2 bad arguments."""
    quantizations = ENGINES[engine][1]
    parser = build_parser(docstring)
    parser.add_argument(
        "--quantization", default=next(iter(quantizations)), choices=list(quantizations), help="default: %(default)s"
    )
    parser.add_argument("--repeats", "-r", type=int, default=5, help="timed generations (default: %(default)s)")
    args = parse(parser, argv)
    command = repro(f"peers/{engine}_peer.py", sys.argv[1:] if argv is None else argv)
    record = contenders.new_record(Peer(engine, args.quantization), command)
    measure(record, PeerJob(
        peer=Peer(engine, args.quantization), python=args.peers_python, model_dir=args.model_dir, threads=args.threads,
        workload=args.workload, prompt_ids=args.inputs.input_ids[0].tolist(),
    ))  # fmt: skip
    validate(record)
    path = args.results_dir / f"{record['name']}_results.json"
    records.save_json(path, record)
    speeds = [f"{kind} {record[f'{kind}_tokens_per_s']:.1f} tokens/s" for kind in ("decode", "prefill")
              if record[f"{kind}_tokens_per_s"]]  # fmt: skip
    console.print(f"{record['title']}: {', '.join(speeds) or record['status'] + ': ' + str(record['reason'])}", markup=False)
    console.print(f"record: {path}", markup=False)
    return 1 if record["status"] in ("failed", "oom") else 0


def measure(record: dict, job: PeerJob) -> None:
    """Load, one warm-up block, the timed blocks, then memory; whatever ends it becomes status and reason."""
    process = None
    try:
        process = PeerProcess(job)
        contenders.describe_loaded(record, process.call("load"), process.version)
        process.call("block")
        judgement.fill_medians(record, [process.call("block") for _ in range(job.workload.repeats)])
        record["peak_memory_mb"] = process.call("memory")["peak_memory_mb"]
        record["status"], record["reason"] = "ok", None
    except RecipeError as error:
        record["status"], record["reason"] = error.status, str(error)
    finally:
        if process is not None:
            process.close()
