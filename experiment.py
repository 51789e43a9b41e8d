"""Running recipes: each in its own process, timed in turns with the baseline, its record saved before the next begins."""

from __future__ import annotations

import importlib
import statistics
import sys
import tempfile
from pathlib import Path

from rich.console import Console

import charts
import inputs
import interleave
import models
import records
import report
from bandwidth import measure_read_bandwidth
from store import ResultsFolder
from worker import Job, RecipeError, Steps, WorkerProcess

BASELINE = "baseline"
SPEED_QUANTITIES = ("decode_tokens_per_s", "prefill_tokens_per_s", "ttft_ms", "tpot_ms")
console = Console(stderr=True, highlight=False)


def run(recipes: dict[str, Steps], args, *, parser, titles: dict[str, str] | None = None, aa: bool = False) -> int:
    """Measure the baseline and `recipes`, print the table, draw the charts. Returns the exit code: 0, 1 or 130.

    `args` come from `cli.parse`. With `aa`, the baseline is also compared with itself: the run's noise floor.
    """
    import cli

    try:
        for steps in recipes.values():
            check_steps(steps, args.config)
        prepared = inputs.prepare(
            models.load_tokenizer(args.source), args.workload, vocab_size=args.config.vocab_size,
            prompts=args.prompts, text_file=args.text_file,
        )  # fmt: skip
    except ValueError as error:
        cli.fail(parser, error)
    environment = records.environment(device=args.torch_device, threads=args.threads)
    environment["read_bandwidth_gb_per_s"] = measure_read_bandwidth(args.torch_device)
    folder = Path(args.results_dir)
    store = ResultsFolder(folder, environment=environment, **_description(args, prepared))
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".scratch-") as scratch:
            session = _Session(args, prepared, store, Path(scratch), environment, titles or {})
            session.measure_all(recipes, aa=aa)
    except KeyboardInterrupt:
        console.print("interrupted: finished results are kept")
        _publish(store)
        return 130
    _publish(store)
    return 1 if any(store.records[name]["status"] == "failed" for name in [BASELINE, *recipes]) else 0


def check_steps(steps: Steps, config) -> None:
    """Let every technique that can judge its options without weights do so. Raises ValueError."""
    for technique, options in steps:
        check = getattr(importlib.import_module(f"optimizations.{technique}"), "check", None)
        if check is not None:
            check(config, **options)


def _description(args, prepared: inputs.Inputs) -> dict:
    """`workload` as records show it, and `identity`: what two results must share to stand in one table."""
    workload = args.workload.as_dict() | {"quality": prepared.quality_protocol}
    identity = {
        "workload": {key: value for key, value in workload.items() if key != "repeats"},
        "model": [args.source.name, args.source.revision], "device": str(args.torch_device), "threads": args.threads,
        "cpu": records.cpu_name(),
    }  # fmt: skip
    return {"workload": workload, "identity": identity}


def _publish(store: ResultsFolder) -> None:
    if store.records:
        report.print_table(store.consolidated())
        charts.draw_all(store.consolidated(), store.folder)
        print(f"\nresults: {store.folder}/consolidated_results.json, charts: {store.folder}/visualizations/")


class _Session:
    """One run: the baseline's worker stays alive, each recipe's worker takes turns with it and ends."""

    def __init__(self, args, prepared: inputs.Inputs, store: ResultsFolder, scratch: Path, environment: dict, titles: dict):
        self.args, self.inputs, self.store, self.scratch, self.titles = args, prepared, store, scratch, titles
        self.bandwidth_gb_per_s = environment["read_bandwidth_gb_per_s"]
        self.reference_file = str(scratch / "reference.safetensors")
        self.tokenizer = models.load_tokenizer(args.source)
        self.baseline_worker: WorkerProcess | None = None
        self.baseline: dict = {}
        self.baseline_samples: list[dict] = []
        self.baseline_continuations: list[list[int]] = []

    def measure_all(self, recipes: dict[str, Steps], *, aa: bool) -> None:
        with self._start([]) as self.baseline_worker:
            self.baseline = self._record(BASELINE, [])
            self._guarded(self.baseline, self._measure_baseline)
            if self.baseline["status"] != "ok":
                return
            if aa:
                self._measure_noise_floor()
            for number, (name, steps) in enumerate(recipes.items(), 1):
                record = self._record(name, steps)
                console.print(f"[{number}/{len(recipes)}] {name}", style="bold", markup=False)
                with self._start(steps) as worker:
                    self._guarded(record, lambda record, worker=worker: self._measure_variant(record, worker))
                self._report_line(record)

    def _start(self, steps: Steps) -> WorkerProcess:
        args = self.args
        return WorkerProcess(Job(
            source=args.source, steps=steps, device=str(args.torch_device), threads=args.threads, workload=args.workload,
            scratch_dir=str(self.scratch), input_ids=self.inputs.input_ids,
        ))  # fmt: skip

    def _record(self, name: str, steps: Steps) -> dict:
        args = self.args
        return records.new_record(
            name=name, title=self.titles.get(name, name), status="ok", model=args.source.name, device=str(args.torch_device),
            random_weights=args.source.random_weights, repro=_repro(name), quality_protocol=self.inputs.quality_protocol,
            steps=[{"technique": technique, "options": resolved(technique, options)} for technique, options in steps],
        )  # fmt: skip

    def _guarded(self, record: dict, measure) -> None:
        """Run `measure(record)`; whatever ends it becomes the record's status and reason. The record is saved."""
        try:
            measure(record)
        except RecipeError as error:
            record["status"], record["reason"] = error.status, str(error)
            if error.details and error.status == "failed":
                console.print(error.details, style="dim", markup=False)
        except KeyboardInterrupt:
            record["status"], record["reason"] = "interrupted", "interrupted from the keyboard"
            raise
        finally:
            self.store.save(record)

    def _measure_baseline(self, record: dict) -> None:
        worker = self.baseline_worker
        self._measure_common(record, worker)
        if self.inputs.windows is not None:
            with console.status("baseline: quality"):
                summary = worker.call("score_baseline", windows=self.inputs.windows, reference_file=self.reference_file)
            record.update({key: value for key, value in summary.items() if key in record})
            self.baseline_continuations = self._continuations(worker)
            record["continuations"] = self._texts(self.baseline_continuations, None)
        with console.status("baseline: timing"):
            self.baseline_samples = [worker.call("block") for _ in range(self.args.workload.repeats)]
        record["speedup"] = record["prefill_speedup"] = record["ceiling_speedup"] = 1.0
        self._fill_speed(record, self.baseline_samples)
        self._report_line(record)

    def _measure_variant(self, record: dict, worker: WorkerProcess) -> None:
        self._measure_common(record, worker)
        if self.inputs.windows is not None:
            with console.status(f"{record['name']}: quality"):
                summary = worker.call("score_variant", reference_file=self.reference_file)
            record.update({key: value for key, value in summary.items() if key in record})
            record["continuations"] = self._texts(self.baseline_continuations, self._continuations(worker))
        comparison = self._interleave(record["name"], worker)
        decode, prefill = comparison.ratio("decode_tokens_per_s"), comparison.ratio("prefill_tokens_per_s")
        if decode is not None:
            record.update(speedup=decode.median, speedup_ci=decode.interval, verdict=decode.verdict)
        record.update(prefill_speedup=prefill.median, prefill_speedup_ci=prefill.interval)
        record["ceiling_speedup"] = self.baseline["bytes_per_token"] / record["bytes_per_token"]
        self._fill_speed(record, comparison.variant)
        record["targets_met"] = records.judge_targets(record, self.baseline)
        record["explanation"] = explain(record)
        self.baseline_samples += comparison.baseline
        self._fill_speed(self.baseline, self.baseline_samples)
        self.store.save(self.baseline)

    def _measure_common(self, record: dict, worker: WorkerProcess) -> None:
        """Load and memory and size: what baseline and variants share."""
        with console.status(f"{record['name']}: loading"):
            loaded = worker.call("load")
        streamed_bytes = loaded.pop("streamed_bytes")
        record.update(loaded)
        with console.status(f"{record['name']}: memory"):
            record.update(worker.call("memory"))
        with console.status(f"{record['name']}: size on disk"):
            record["model_size_mb"] = worker.call("size")
        work = self.args.workload
        mean_fill = (work.depth + work.prompt_tokens + work.new_tokens / 2) / (work.positions - 1 or 1)
        record["bytes_per_token"] = streamed_bytes + record["kv_cache_mb"] * 1e6 * min(1.0, mean_fill)

    def _interleave(self, name: str, worker: WorkerProcess) -> interleave.Comparison:
        worker.call("block")  # warm-up of the same shape, discarded
        with console.status(f"{name}: timing in turns with the baseline") as status:
            return interleave.interleave(
                lambda: self.baseline_worker.call("block"), lambda: worker.call("block"),
                pairs=self.args.workload.repeats, seed=self.args.seed,
                progress=lambda done, _: status.update(f"{name}: timing, pair {done}"),
            )  # fmt: skip

    def _measure_noise_floor(self) -> None:
        with self._start([]) as twin:
            twin.call("load")
            comparison = self._interleave("A/A", twin)
        decode, prefill = comparison.ratio("decode_tokens_per_s"), comparison.ratio("prefill_tokens_per_s")
        inside = [ratio.verdict in (None, "no difference resolved") for ratio in (decode, prefill) if ratio is not None]
        self.store.aa = {
            "speedup": decode and decode.median, "speedup_ci": decode and decode.interval,
            "prefill_speedup": prefill.median, "prefill_speedup_ci": prefill.interval, "trustworthy": all(inside),
        }  # fmt: skip

    def _fill_speed(self, record: dict, samples: list[dict]) -> None:
        record["samples"] = {key: [sample[key] for sample in samples if key in sample] for key in SPEED_QUANTITIES}
        for key, values in record["samples"].items():
            record[key] = statistics.median(values) if values else None
        if record["tpot_ms"] and self.bandwidth_gb_per_s:
            record["mbu"] = record["bytes_per_token"] / (record["tpot_ms"] * 1e-3) / (self.bandwidth_gb_per_s * 1e9)

    def _continuations(self, worker: WorkerProcess) -> list[list[int]]:
        return worker.call("continuations", prompts=self.inputs.prompt_ids, new_tokens=inputs.CONTINUATION_TOKENS)

    def _texts(self, baseline: list[list[int]], variant: list[list[int]] | None) -> list[dict]:
        decode = self.tokenizer.decode
        rows = [{"prompt": prompt, "baseline": decode(ids)} for prompt, ids in zip(self.inputs.prompts, baseline, strict=True)]
        for row, ids in zip(rows, variant or [], strict=False):
            row["variant"] = decode(ids)
        return rows

    def _report_line(self, record: dict) -> None:
        if record["status"] != "ok":
            console.print(f"  {record['name']}: {record['status']}: {record['reason']}", markup=False)
            return
        quality = "" if record["perplexity"] is None else f", perplexity {record['perplexity']:.2f}"
        decode = record["decode_tokens_per_s"]
        speed = f"decode {decode:.1f} tokens/s" if decode else f"prefill {record['prefill_tokens_per_s']:.0f} tokens/s"
        console.print(f"  {record['name']}: {speed}, peak {record['peak_memory_mb']:.0f} MB{quality}", markup=False)


def resolved(technique: str, options: dict) -> dict:
    """`options` with the defaults of the technique's `apply` filled in, so that a record stands alone."""
    defaults = importlib.import_module(f"optimizations.{technique}").apply.__kwdefaults__ or {}
    return defaults | options


def explain(record: dict) -> str | None:
    """One sentence on why the speed-up is what it is; None where decode was not measured."""
    if record["speedup"] is None:
        return None
    return (
        f"{record['name']}: {record['speedup']:.2f}x of at most {record['ceiling_speedup']:.2f}x; "
        f"{record['bytes_per_token'] / 1e6:.0f} MB are read per token"
        + (f", at {record['mbu']:.0%} of this machine's read bandwidth." if record["mbu"] else ".")
    )


def _repro(name: str) -> str:
    """The command this record came from, narrowed to its recipe where it was one of several."""
    script = Path(sys.argv[0])
    shown = f"optimizations/{script.name}" if script.parent.name == "optimizations" else script.name
    flags = [flag for flag in sys.argv[1:] if flag != "--quick"] + (["--quick"] if "--quick" in sys.argv else [])
    if script.name == "run_optimization.py" and "--recipes" not in flags and name != BASELINE:
        flags += ["--recipes", name]
    return " ".join(["python", shown, *flags])


