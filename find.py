"""Finding the best recipe for this machine: `run_optimization.py --find`. What the search knows and decides is in search.py.

First every choice alone, under the lean pass, in a process of its own: loss on a few windows of *calibration* text, bytes,
memory, a few timed generations. A choice takes seconds; rounding to int4 and pruning take minutes, so they come last. These two
learn from the text that they are judged on here: their loss looks a little smaller than it is. Then the few stacks that look
best are measured like any recipe, on evaluation text and in turns with the baseline; only that decides. find_results.json is
written after each step, so that a search that was stopped goes on where it was; what `--find-minutes` leaves no time for is
named.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import experiment
import readings
import records
import search
import stacks
from arguments import without_flags
from measurement import BASELINE, Measurement, console
from search import Limits, Single, Stack
from stacks import Steps
from store import read_json, set_aside
from texts import load_text
from worker import Job, RecipeError, WorkerProcess

RESULTS = "find_results.json"
WINDOWS, WINDOW = 8, 256  # tokens of calibration text: 2 048 in all
TIMED = 4
SHARE_ALONE = 0.75  # of the time, for choices alone; whole stacks mostly find what those calibrated
# Half of int4's own text, none that the model writes, and one rounding for all widths: that takes five minutes where whole
# calibration takes twenty. A few steps of tuning take minutes and gain at 4.6 bits, nothing that shows at 6 and 7.
BRIEFLY = {"calibration_tokens": 8192, "generated_share": 0.0}
TUNE_STEPS = {"int4-4.6bit": 16}
MINUTES, MIN_RETENTION = 18.0, 0.97  # by default: under 20 with what comes before and after
FLAGS = ("--min-retention", "--max-memory-mb", "--min-speedup", "--find-minutes")


def add_flags(parser) -> None:
    group = parser.add_argument_group("search")
    group.add_argument("--find", action="store_true", help="find the fastest stack that keeps the limits below")
    group.add_argument("--min-retention", type=float, metavar="R", help=f"share of quality to keep (default: {MIN_RETENTION})")
    group.add_argument("--max-memory-mb", type=float, metavar="MB", help="highest peak memory (default: any)")
    group.add_argument("--min-speedup", type=float, metavar="S", help="least decode speed-up (default: any)")
    group.add_argument(
        "--find-minutes", type=float, metavar="M", help=f"what the search may take, the baseline aside (default: {MINUTES:g})"
    )


def check(args) -> Limits:
    """The limits that the flags set. Raises ValueError naming the flag."""
    values = {flag: getattr(args, flag.strip("-").replace("-", "_")) for flag in FLAGS}
    given = {flag: value for flag, value in values.items() if value is not None}
    if given and not args.find:
        raise ValueError(f"{min(given)}: belongs to --find")
    if args.find and (args.recipes is not None or args.stack):
        raise ValueError("--find: chooses its recipes itself; leave out --recipes and --stack")
    retention = given.pop("--min-retention", MIN_RETENTION)
    if not 0 < retention < 1:
        raise ValueError(f"--min-retention {retention:g}: choose a number between 0 and 1, e.g. 0.97")
    for flag, value in given.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{flag} {value:g}: choose a number above 0")
    if args.find and args.source.random_weights:
        raise ValueError(f"--find: {args.source.name} has random weights and no quality to keep; choose a real model")
    if args.find and args.workload.new_tokens < 2:
        raise ValueError("--new-tokens 1: a search compares decode speed, choose 2 or more")
    return Limits(retention, given.get("--max-memory-mb"), given.get("--min-speedup"))


def run(args, limits: Limits, *, parser) -> int:
    """Search, measure what looks best, say which recipe it is. Exit codes as of `experiment.run`."""
    finder = Finder(args, limits)
    code = experiment.run({}, args, parser=parser, search=finder.choose_recipes)
    finder.conclude()
    return code or (1 if finder.impossible or finder.failures() else 0)


class Finder:
    """One search: the choices measured alone so far, and what came of them."""

    def __init__(self, args, limits: Limits):
        self.args, self.limits = args, limits
        self.started, self.seconds = time.time(), 60 * (args.find_minutes or MINUTES)
        self.file = Path(args.results_dir) / RESULTS
        self.state: dict = {}
        self.picked: dict[str, Steps] = {}
        self.impossible = ""  # why nothing can be searched here, if so

    def choose_recipes(self, measurement: Measurement) -> dict[str, Steps]:
        """Measure the choices alone, estimate all stacks, and name those to measure, the cheap ones first."""
        self.started = time.time()  # a model is downloaded before
        self._resume(measurement.store.consolidated())
        for number, name in enumerate([BASELINE, *search.BY_EXPENSE], 1):
            self._try_alone(name, measurement, f"[{number}/{1 + len(search.BY_EXPENSE)}] {name}")
            if name in (BASELINE, "lean") and (alone := self.state["alone"][name])["status"] != "ok":
                if alone["status"] != "interrupted":
                    self.impossible = f"{name} cannot be measured here ({alone['reason']})"
                console.print("the search ends here: everything is compared with the baseline and builds on lean", markup=False)
                return {}
        estimated = self._estimates()
        chosen = sorted(search.worth_measuring(estimated, self.limits), key=self._seconds_again)
        self.picked = {stack.name: self._steps(stack.choices) for stack in chosen}
        self.state["picked"] = list(self.picked)
        self._save()
        console.print(f"{len(estimated)} stacks estimated; to be measured: {', '.join(self.picked)}", markup=False)
        measurement.titles |= {name: " + ".join(name.split("+")) for name in self.picked}
        measurement.repro = lambda name: command(self.picked.get(name, []))
        measurement.deadline = self.started + self.seconds
        return self.picked

    def conclude(self) -> None:
        """The front, the choice and the command that repeats it: on the terminal and in the file."""
        if not self.state:
            return  # stopped before it began: what an earlier search kept stays as it is
        try:
            measured = readings.load_results(self.args.results_dir)["results"]
        except ValueError:
            measured = []  # stopped before anything was measured to the end
        found, nearest = search.choose(measured, self.limits)
        front = search.measured_front(measured)
        alone = self.state.get("alone", {})
        late = [name for name in search.BY_EXPENSE if alone.get(name, {}).get("status", "interrupted") == "interrupted"]
        ended = {record["name"] for record in measured if record["status"] != "interrupted"}
        late = [] if self.impossible else late + [name for name in self.picked if name not in ended]
        best = found or nearest
        repeat = best and command([(step["technique"], step["options"]) for step in best["steps"]])
        sentence = self.impossible or _verdict(found, nearest, self.limits, whole=not late)
        self.state |= {
            "front": [record["name"] for record in front], "pick": found and found["name"],
            "nearest": nearest and nearest["name"], "not_reached": late, "sentence": sentence, "command": repeat,
        }  # fmt: skip
        try:
            self._save()
        except OSError as error:
            console.print(f"{self.file.name} could not be written: {error}", markup=False)
        shown = console if self.args.json else Console(width=None if sys.stdout.isatty() else 130, soft_wrap=True)
        if front:
            shown.print(_table(front, {stack["name"]: stack for stack in self.state.get("estimates", [])}))
        for line in (sentence, f"Repeat it with: {repeat}" if repeat else None):
            if line:
                shown.print(line, markup=False, highlight=False)
        if late:
            shown.print(f"Not reached: {', '.join(late)}. The same command goes on from here.")
        for name, reason in self.failures().items():
            shown.print(f"Failed, and in no stack therefore: {name} ({reason})", markup=False)

    def failures(self) -> dict[str, str]:
        """Choices that failed when they were measured alone, and why."""
        alone = self.state.get("alone", {}).items()
        return {name: entry["reason"] for name, entry in alone if entry["status"] in ("failed", "oom")}

    def _resume(self, consolidated: dict) -> None:
        head = {key: consolidated[key] for key in ("environment", "workload", "identity")}
        earlier = read_json(self.file) or {}
        same = self.args.resume and earlier.get("identity") == head["identity"]
        if not same:
            set_aside(self.file.parent, [self.file])
        kept = earlier.get("alone", {}) if same else {}
        kept = {name: alone for name, alone in kept.items() if alone["status"] in ("ok", "unsupported")}
        self.state = {"schema_version": 1, **head, "limits": dataclasses.asdict(self.limits), "alone": kept}

    def _save(self) -> None:
        records.save_json(self.file, self.state)

    def _try_alone(self, name: str, measurement: Measurement, where: str) -> None:
        """Measure one choice unless that is done, impossible, or hopeless; a failure is noted and the search goes on."""
        reference = measurement.store.cache / "calibration_reference.safetensors"
        steps = [] if name == BASELINE else self._steps(search.alone(name))
        spelled = stacks.spell(steps)
        before = self.state["alone"].get(name, {})
        if before.get("stack") == spelled and (name != BASELINE or reference.exists()):
            console.print(f"{where}: measured before", markup=False)
            return
        reason = self._why_not(name)
        entry = {"status": "skipped", "reason": reason} if reason else self._measure_alone(steps, measurement, reference, where)
        self.state["alone"][name] = {"stack": spelled, **entry}
        self._save()
        console.print(f"{where}: {entry['reason'] or _alone_line(entry)}", markup=False)

    def _why_not(self, name: str) -> str | None:
        """Why a choice need not be measured; None: it is to be."""
        pruned = search.pruned_share(name, self.args.config)
        if pruned is not None and pruned < search.WORTH_TRYING:
            return f"takes {pruned:.1%} off what a token reads: too little to be seen in its time"
        milder = search.hopeless(name, self._singles(), self.limits)
        if milder is not None:
            return f"{milder} alone loses more than is allowed"
        return "takes minutes: left out of a quick search" if self.args.quick and pruned is not None else None

    def _measure_alone(self, steps: Steps, measurement: Measurement, reference: Path, where: str) -> dict:
        args, start = self.args, time.time()
        deadline = self.started + SHARE_ALONE * self.seconds
        job = Job.of(args, steps, measurement.inputs.input_ids, measurement.scratch, deadline=deadline)
        try:
            experiment.check_steps(steps, args.config)
            with console.status(f"{where}: alone"), WorkerProcess(job) as worker:
                loaded, memory = worker.load(), worker.call("memory")
                worker.call("block")  # warm-up, discarded
                # The shortest: other work on the machine can only add.
                tpot_ms = min(worker.call("block")["tpot_ms"] for _ in range(TIMED))
                if steps:
                    quality = worker.call("score_variant", reference_file=str(reference))
                else:
                    windows = calibration_windows(measurement.tokenizer, args.config.max_position_embeddings)
                    quality = worker.call("score_baseline", windows=windows, reference_file=str(reference))
        except (RecipeError, ValueError) as error:
            return {"status": getattr(error, "status", "unsupported"), "reason": str(error)}
        interval = quality["delta_nll_ci"]
        return {
            "status": "ok", "reason": None, "seconds": time.time() - start, "apply_s": worker.calibrated_s or loaded["apply_s"],
            "tpot_ms": tpot_ms, "peak_memory_mb": memory["peak_memory_mb"], "loss_ci": interval,
            "loss": quality["delta_nll"], "loss_low": interval[0] if interval else quality["delta_nll"],
            "streamed_mb": loaded["evidence"]["streamed_bytes"] / 1e6, "kv_mb": memory["kv_cache_mb"],
            "weights_mb": loaded["weights_mb"], "rest_mb": memory["peak_memory_mb"] - loaded["weights_mb"],
        }  # fmt: skip

    def _steps(self, choices) -> Steps:
        """As search.py has them, in the half precision asked for, calibrated briefly; a quick search rounds to nearest."""
        tune_steps = max(TUNE_STEPS.get(name, 0) for name in choices)
        changes = {"int4": {"rounding": "nearest"} if self.args.quick else BRIEFLY | {"tune_steps": tune_steps},
                   "mixed_precision": {"dtype": self.args.dtype} if self.args.dtype != "auto" else {}}  # fmt: skip
        return [(technique, options | changes.get(technique, {})) for technique, options in search.steps_of(choices)]

    def _singles(self) -> dict[str, Single]:
        fields = Single.__dataclass_fields__
        measured = {name: alone for name, alone in self.state["alone"].items() if alone["status"] == "ok" and name != BASELINE}
        return {name: Single(**{field: alone[field] for field in fields}) for name, alone in measured.items()}

    def _estimates(self) -> list[Stack]:
        every = search.all_stacks(self._singles(), baseline_tpot_ms=self.state["alone"][BASELINE]["tpot_ms"])
        self.state["estimates"] = [
            {"name": stack.name, "speedup": stack.speedup, "retention": stack.retention, "memory_mb": stack.memory_mb,
             "bytes_per_token": stack.megabytes_per_token * 1e6} for stack in every
        ]  # fmt: skip
        return every

    def _seconds_again(self, stack: Stack) -> float:
        """Seconds of rounding that must be spent anew: what was kept on disk was found on weights that nobody had pruned.

        Of int4 whatever the width: the first width measured alone was rounded for all of them."""
        heads, width, weights, _ = stack.choices
        if not weights or not (heads or width):
            return 0
        kind = weights.partition("-")[0]
        alike = [alone for name, alone in self.state["alone"].items() if name.partition("-")[0] == kind]
        return max(alone.get("apply_s") or 0 for alone in alike)


def calibration_windows(tokenizer, positions: int) -> torch.Tensor:
    """A few short windows spread over the calibration text, int64 [8, 256] or what the text and the positions allow."""
    ids = torch.tensor(tokenizer(load_text("calibration").content, verbose=False).input_ids)
    rows = ids.unfold(0, min(WINDOW, positions), min(WINDOW, positions))
    return rows[torch.linspace(0, len(rows) - 1, min(WINDOWS, len(rows))).round().long()]


def command(steps: Steps) -> str:
    """What to type to measure exactly this stack: the flags of this run without the search's, and the stack."""
    flags = [flag for flag in sys.argv[1:] if flag not in ("--find", "--no-resume")]
    flags = without_flags(flags, *FLAGS, "--dtype")  # the stack spells it
    if not steps:
        return shlex.join(["python", "baseline.py", *flags])
    return shlex.join(["python", "run_optimization.py", *flags, "--stack", stacks.spell(steps)])


def _alone_line(entry: dict) -> str:
    return (
        f"loses {entry['loss']:.4f} nats a token, streams {entry['streamed_mb']:.0f} MB and takes {entry['tpot_ms']:.1f} ms "
        f"for one ({entry['seconds']:.0f} s)"
    )


def _verdict(found: dict | None, nearest: dict | None, limits: Limits, *, whole: bool) -> str:
    """`whole`: nothing that was to be measured is missing."""
    best = found or nearest
    if best is None:
        return "Nothing was measured to the end: the same command goes on from here."
    interval = best["perplexity_retention_ci"]
    low = f" (at least {interval[0]:.2%})" if interval else ""
    what = (
        f"{best['name']}: decode {best['speedup']:.2f}x, {best['perplexity_retention']:.2%} of the quality{low}, peak memory "
        f"{best['peak_memory_mb']:.0f} MB"
    )
    if found:
        return f"{'Best recipe for this machine' if whole else 'Best of what was measured so far'}: {what}."
    wanted = {"retention": f"retention {limits.min_retention:g}", "memory": f"{limits.max_memory_mb or 0:g} MB",
              "speed": f"{limits.min_speedup or 0:g}x"}  # fmt: skip
    missed = " and ".join(f"{wanted[name]} by {share:.1%}" for name, share in search.missed(best, limits).items())
    return f"No measured recipe keeps the limits. Nearest is {what}: it misses {missed}."


def _table(front: list[dict], estimates: dict[str, dict]) -> Table:
    table = Table(title="Pareto front: no measured recipe is better in speed, quality and memory at once", title_justify="left")
    table.add_column("recipe")
    for column in ("decode speed-up", "retention", "peak MB", "model MB", "estimated"):
        table.add_column(column, justify="right")
    for record in front:
        guess = estimates.get(record["name"])
        kept = readings.share(record["perplexity_retention"], record["perplexity_retention_ci"])
        speed = readings.times(record["speedup"], record["speedup_ci"])
        size = "not measured" if record["model_size_mb"] is None else f"{record['model_size_mb']:.0f}"
        table.add_row(
            record["name"], speed, kept, f"{record['peak_memory_mb']:.0f}", size,
            f"{guess['speedup']:.2f}x, {guess['retention']:.2%}" if guess else "",
        )  # fmt: skip
    return table
