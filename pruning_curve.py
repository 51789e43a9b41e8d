"""Which kind of pruning pays: quality against the share of a token's bytes removed, at the same bytes for every kind.

Four kinds are cut by about 2, 4.5 and 9 % of what a decoded token streams (`--shares`): query heads (chosen by calibration,
the rest refitted), MLP width (likewise), attention sublayers, and whole blocks (chosen one after another, nothing refitted). A
sublayer or a block is one piece, so theirs is the nearest whole number. Each point is a process of its own that is scored like
any recipe, on evaluation text, with intervals; speed is not timed here. Writes equal_bytes_results.json after each point, and
visualizations/equal_bytes.png; a run that was stopped goes on where it was. Calibration takes minutes once per kind, then is
kept in ~/.cache/tinyllama-optimization.

    python pruning_curve.py --model smollm2-135m
    python pruning_curve.py --model smollm2-135m --kinds attention,blocks --shares 0.03,0.06 --quick
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import charts
import cli
import experiment
import inputs
import models
import readings
import records
from arguments import fail
from measurement import BASELINE, console
from search import count_weights, prunable_weights
from stacks import Steps
from store import is_valid, lock, read_json, set_aside, validate
from worker import Job, RecipeError, WorkerProcess

RESULTS = "equal_bytes_results.json"
SHARES = (0.02, 0.045, 0.09)  # of the weights that a token streams; a quarter of TinyLlama's heads is 4.5 %
KINDS = ("attention", "blocks", "heads", "width")  # the ones that need no refit first


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 1 a point failed, 2 bad arguments, 130 interrupted."""
    parser = cli.build_parser(__doc__, without=cli.OF_TIMING)
    parser.add_argument("--kinds", default=",".join(KINDS), metavar="A,B", help="which kinds (default: %(default)s)")
    parser.add_argument("--shares", default=",".join(map(str, SHARES)), metavar="X,Y",
        help="how much of what a token streams goes, above 0 and below 1 (default: %(default)s)")  # fmt: skip
    args = cli.parse(parser, argv)
    try:
        kinds = [kind.strip() for kind in args.kinds.split(",")]
        if unknown := set(kinds) - set(KINDS):
            raise ValueError(f"--kinds {min(unknown)!r}: choose from {', '.join(KINDS)}")
        shares = parse_shares(args.shares)
        if args.axes:
            raise ValueError("--depth: choose one; several are for run_optimization.py")
        if args.source.random_weights:
            raise ValueError(f"--model {args.source.name}: random weights have no quality to lose; choose a real model")
        tokenizer = models.load_tokenizer(args.source)
        prepared = inputs.prepare(tokenizer, args, vocab_size=args.config.vocab_size)
        models.fetch_weights(args.source)
        held = lock(Path(args.results_dir))
        curve = Curve(args, prepared)
    except ValueError as error:
        fail(parser, error)
    except OSError as error:
        console.print(f"stopped before anything was measured: {error}", markup=False)
        return 1
    code = 0
    try:
        with tempfile.TemporaryDirectory() as scratch:
            curve.measure(plan(args.config, kinds, shares), Path(scratch))
    except KeyboardInterrupt:
        console.print("interrupted: finished points are kept", markup=False)
        code = 130
    except OSError as error:
        console.print(f"stopped, finished points are kept: {error}", markup=False)
        code = 1
    for record in curve.records.values():
        print(point_line(record, curve.records.get(BASELINE)))
    try:
        charts.draw_all_own(args.results_dir)
    except OSError as error:
        console.print(f"no charts: {error}", markup=False)
        code = code or 1
    held.release()
    return code or (1 if curve.statuses & {"failed", "oom"} else 0)


def parse_shares(text: str) -> list[float]:
    """The shares that `--shares` lists. Raises ValueError, naming the flag."""
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = []
    if not shares or not all(0 < share < 1 for share in shares):
        raise ValueError(f"--shares {text}: choose numbers between 0 and 1, separated by commas")
    return shares


def plan(config, kinds, shares=SHARES) -> dict[str, tuple[str, Steps]]:
    """Name -> (title, steps) of every point, by the bytes that the configuration tells."""
    layers, prunable = config.num_hidden_layers, prunable_weights(config)
    _, attention, mlp, streamed = count_weights(config)
    points: dict[str, tuple[str, Steps]] = {}
    for kind in kinds:
        for share in shares:
            going = share * streamed
            if kind in ("attention", "blocks"):
                count = max(1, round(going / (attention + (mlp if kind == "blocks" else 0))))
                title = f"{count} {'attention sublayer' if kind == 'attention' else 'block'}{'s' if count > 1 else ''}"
                points[f"{kind}-{count}"] = (title, [("layer_pruning", {"what": kind, "count": count})])
                continue
            technique, options = {"heads": ("head_pruning", {"method": "calibrated"}), "width": ("mlp_pruning", {})}[kind]
            ratio = round(going / (layers * prunable[technique]), 3)
            title = f"{ratio:.1%} of the {'heads' if kind == 'heads' else 'MLP width'}"
            points[f"{kind}-{ratio:g}"] = (title, [(technique, options | {"prune_ratio": ratio})])
    return points


class Curve:
    """The points measured so far, and the file they are in."""

    def __init__(self, args, prepared: inputs.Inputs):
        self.args, self.prepared = args, prepared
        self.file = Path(args.results_dir) / RESULTS
        environment = records.environment(device=args.torch_device, threads=args.threads)
        workload, identity = experiment.describe(args, prepared, environment)
        self.head = {"schema_version": 1, "environment": environment, "workload": workload, "identity": identity}
        earlier = read_json(self.file) or {}
        same = args.resume and earlier.get("identity") == identity
        if earlier and not same and (moved_to := set_aside(self.file.parent, [self.file])):
            console.print(f"NOTE  earlier points (measured differently) were moved to {moved_to}", markup=False)
        kept = [record for record in earlier.get("results", []) if same and is_valid(record) and record["status"] == "ok"]
        self.records = {record["name"]: record for record in kept}
        self.statuses: set[str] = set()  # of what was measured now

    def measure(self, points: dict[str, tuple[str, Steps]], scratch: Path) -> None:
        """The baseline, whose answers the others are compared with, then each point that is not there yet."""
        waiting = {name: point for name, point in points.items() if name not in self.records}
        if not waiting:
            return
        for number, (name, (title, steps)) in enumerate([(BASELINE, ("Baseline (fp32)", [])), *waiting.items()]):
            with console.status(f"[{number}/{len(waiting)}] {title}"):
                record = self._measure_point(name, title, steps, scratch)
            validate(record)
            failed_again = record["status"] != "ok" and name in self.records  # the baseline, which kept points need
            if not failed_again:
                self.records[name] = record
                records.save_json(self.file, self.head | {"results": list(self.records.values())})
            console.print(f"[{number}/{len(waiting)}] {point_line(record, self.records[BASELINE])}", markup=False)
            self.statuses.add(record["status"])
            if name == BASELINE and record["status"] != "ok":
                return

    def _measure_point(self, name: str, title: str, steps: Steps, scratch: Path) -> dict:
        args, reference = self.args, str(scratch / "reference.safetensors")
        record = records.new_record(
            name=name, title=title, status="ok", model=args.source.name, device=str(args.torch_device), random_weights=False,
            repro=experiment.repro(name), quality_protocol=self.prepared.quality_protocol,
            steps=records.resolved(steps),
        )  # fmt: skip
        job = Job.of(args, steps, self.prepared.input_ids, scratch)
        try:
            experiment.check_steps(steps, args.config)
            with WorkerProcess(job) as worker:
                record.update(worker.load() | worker.call("memory"))
                if steps:
                    quality = worker.call("score_variant", reference_file=reference)
                else:
                    quality = worker.call("score_baseline", windows=self.prepared.windows, reference_file=reference)
        except (RecipeError, ValueError) as error:
            return record | {"status": getattr(error, "status", "unsupported"), "reason": str(error)}
        return record | {key: quality[key] for key in records.QUALITY_KEYS}


def point_line(record: dict, baseline: dict | None) -> str:
    """One point in words."""
    if record["status"] != "ok":
        return f"{record['title']}: {record['status']}: {record['reason']}"
    if not record["steps"]:
        return f"{record['title']}: perplexity {record['perplexity']:.2f}, {record['bytes_per_token'] / 1e6:.0f} MB a token"
    gone = 1 - record["bytes_per_token"] / baseline["bytes_per_token"]
    kept = readings.share(record["perplexity_retention"], record["perplexity_retention_ci"])
    return f"{record['title']}: {gone:.1%} of the bytes gone, retention {kept}"


if __name__ == "__main__":
    raise SystemExit(main())
