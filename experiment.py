"""Running recipes from the command line: prepare, measure, print, draw; and what remains when something goes wrong."""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import inputs
import models
import readings
import records
import report
from arguments import fail, without_flags
from bandwidth import read_bandwidth
from kernels.build import no_kernels
from measurement import BASELINE, Measurement, console
from stacks import Steps
from store import ResultsFolder

# Two CPUs of one name may differ by what their vector units can do.
MACHINE = ("cpu", "cpu_features", "vector_capability", "gpu", "threads", "os", "torch", "transformers", "code_sha256")


def run(
    recipes: dict[str, Steps], args, *, parser, titles: dict[str, str] | None = None, aa: bool = False,
    search: Callable[[Measurement], dict[str, Steps]] | None = None,
) -> int:  # fmt: skip
    """Measure the baseline and `recipes`, print the table, draw the charts. Returns the exit code: 0, 1 or 130.

    `args` come from `cli.parse`. With `aa`, the baseline is also compared with itself: the run's noise floor. `search` is
    asked for further recipes once the folder is open and everything is prepared.
    """
    folder, minutes = Path(args.results_dir), getattr(args, "minutes", None)
    try:
        for steps in recipes.values():
            check_steps(steps, args.config)
        tokenizer = models.load_tokenizer(args.source)
        prepared = inputs.prepare(tokenizer, args, vocab_size=args.config.vocab_size)
        models.fetch_weights(args.source)
        environment = records.environment(device=args.torch_device, threads=args.threads)
        workload, identity = describe(args, prepared, environment)
        store = ResultsFolder(folder, environment=environment, workload=workload, identity=identity, resume=args.resume)
        environment |= read_bandwidth(args.torch_device, cache=store.cache, threads=args.threads)
    except ValueError as error:
        fail(parser, error)
    except OSError as error:
        console.print(f"stopped before anything was measured: {error}", markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted before anything was measured")
        return 130
    for notice in (store.notice, records.busy_notice(environment)):
        if notice:
            console.print(f"NOTE  {notice}", markup=False)
    code = 0
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".scratch-") as scratch:
            measurement = Measurement(
                args, prepared=prepared, tokenizer=tokenizer, store=store, scratch=Path(scratch),
                titles={BASELINE: "Baseline (fp32)"} | (titles or {}),
                repro=repro, bandwidth_gb_per_s=environment["read_bandwidth_gb_per_s"],
            )  # fmt: skip
            measurement.deadline = time.time() + 60 * minutes if minutes else None  # whatever was downloaded before
            if search is not None:
                recipes = recipes | search(measurement)
            if recipes or search is None:
                measurement.measure_all(recipes, aa=aa)
            if late := [name for name, status in measurement.ended.items() if status == "interrupted" and minutes]:
                console.print(f"not reached in {minutes:g} minutes: {', '.join(late)}; the same command goes on from there")
            code = 1 if {"failed", "oom"} & set(measurement.ended.values()) else 0
    except KeyboardInterrupt:
        console.print("interrupted: finished results are kept", markup=False)
        code = 130
    except OSError as error:
        console.print(f"stopped, finished results are kept: {error}", markup=False)
        code = 1
    finally:
        publish(store, as_json=args.json)
        store.close()
    return code


def check_steps(steps: Steps, config) -> None:
    """Let every technique that can judge its options without weights do so. Raises ValueError."""
    for technique, options in steps:
        check = getattr(records.technique_module(technique), "check", None)
        if check is not None:
            check(config, **records.defaults_of(technique) | options)


def describe(args, prepared: inputs.Inputs, environment: dict) -> tuple[dict, dict]:
    """`workload` as records show it, and `identity`: what two results must share to stand in one table."""
    workload = args.workload.as_dict() | {
        "quality": prepared.quality_protocol, "axes": args.axes, "precision": args.precision, "budget_s": args.budget_s,
        "prompts_sha256": prepared.sha256,
    }  # fmt: skip
    machine = {key: environment[key] for key in MACHINE} | {"no_kernels": no_kernels(args.torch_device)}
    model = [args.source.name, args.source.revision, models.fingerprint(args.source)]
    identity = {"workload": workload, "model": model, "device": str(args.torch_device)}
    return workload, records.as_saved(identity | machine)


def publish(store: ResultsFolder, *, as_json: bool) -> None:
    """The table and the charts of whatever is in the folder; with `as_json` one line of JSON on stdout instead of the table."""
    if not store.records:
        return
    import charts

    try:
        consolidated = readings.load_results(store.folder)  # as written: the charts carry a digest of what they show
    except ValueError as error:
        console.print(f"no table and no charts: {error}", markup=False)
        return
    if as_json:
        print(json.dumps(consolidated))
    else:
        report.print_table(consolidated)
    try:
        charts.draw_all(consolidated, store.folder)
    except OSError as error:
        console.print(f"no charts: {error}", markup=False)
        return
    console.print(f"results: {store.folder}/consolidated_results.json, charts: {store.folder}/visualizations/", markup=False)


def repro(name: str) -> str:
    """The command that a record came from, narrowed to its recipe where it was one of several of the pipeline's."""
    script = Path(sys.argv[0])
    shown = f"optimizations/{script.name}" if script.parent.name == "optimizations" else script.name
    flags = without_flags(sys.argv[1:], "--minutes")
    if script.name == "run_optimization.py" and name != BASELINE and without_flags(flags, "--stack") == flags:
        flags = [*without_flags(flags, "--recipes"), "--recipes", name]
    return shlex.join(["python", shown, *flags])
