"""One run of recipes: the baseline's worker stays alive, each recipe's worker takes turns with it and ends."""

from __future__ import annotations

import statistics
from pathlib import Path

from rich.console import Console

import inputs
import interleave
import judgement
import readings
import records
from devices import available_memory_mb
from stacks import Steps
from store import ResultsFolder
from worker import Job, RecipeError, WorkerProcess

BASELINE = "baseline"
AXIS_PAIRS = 6  # the fewest that an interval can be had from
NOISE_PAIRS = 8  # judged on two quantities: with six pairs one sound run in sixteen would be called untrustworthy
HEADROOM = 1.15  # a load needs this much more than its measured peak before it counts as fitting
console = Console(stderr=True, highlight=False, soft_wrap=True)


class Side:
    """One side of a comparison: a worker that is started and loaded when first asked, and again if it was let go."""

    def __init__(self, job: Job):
        self.job = job
        self.blame = ""  # what its failure says first, for either side may end a comparison
        self.worker: WorkerProcess | None = None
        self.loaded: dict = {}  # what the worker said of the model when it loaded
        self.rival: Side | None = None  # set where memory holds only one of the two models

    def call(self, command: str, **arguments):
        try:
            return self._call(command, **arguments)
        except RecipeError as error:
            raise RecipeError(error.status, f"{self.blame}{error}", error.details) from None

    def _call(self, command: str, **arguments):
        if self.rival is not None:
            self.rival.release()
        if self.worker is None or not self.worker.alive:
            self.release()
            self.worker = WorkerProcess(self.job)
            try:
                self.loaded = self.worker.load()
            except RecipeError:  # of a process that lives on: it would be taken for one that has a model
                self.release()
                raise
            if command in ("block", "point"):
                self.worker.call(command, **arguments)  # warm-up of the same shape, discarded
        return self.loaded if command == "load" else self.worker.call(command, **arguments)

    def release(self) -> None:
        if self.worker is not None:
            self.worker.close()
            self.worker = None


class Measurement:
    """Measures recipes one after the other; every record is saved the moment it is complete."""

    def __init__(self, args, *, prepared: inputs.Inputs, tokenizer, store: ResultsFolder, scratch: Path, titles: dict[str, str],
                 repro, bandwidth_gb_per_s: float | None):  # fmt: skip
        self.args, self.inputs, self.tokenizer, self.store, self.scratch = args, prepared, tokenizer, store, scratch
        self.titles, self.repro, self.bandwidth_gb_per_s = titles, repro, bandwidth_gb_per_s
        self.deadline: float | None = None  # by time.time(); a recipe that is not measured by then is recorded as interrupted
        self.reference_file = store.cache / "reference.safetensors"
        self.baseline_side = Side(self._job([]))
        self.baseline: dict = {}
        self.baseline_samples: list[dict] = []
        self.baseline_tokens: list[list[int]] = []
        self.ended: dict[str, str] = {}  # name -> status of what was measured now, whatever an earlier run left

    def measure_all(self, recipes: dict[str, Steps], *, aa: bool) -> None:
        """The baseline, the noise floor where `aa`, then each recipe that is not finished already."""
        records_of = {name: self._record(name, steps) for name, steps in recipes.items()}
        done = [name for name, record in records_of.items() if self.store.finished(name, record["steps"])]
        waiting = {name: steps for name, steps in recipes.items() if name not in done}
        if done:
            console.print(f"already measured here, kept: {', '.join(done)}", markup=False)
        if not waiting and self.store.finished(BASELINE, []):
            return
        try:
            self.baseline = self._record(BASELINE, [])
            self._guarded(self.baseline, self._measure_baseline)
            if self.baseline["status"] != "ok":
                return
            self.baseline_side.blame = "the baseline beside it: "
            if aa:  # again when a run goes on: the machine may be noisier now
                self._measure_noise_floor()
            for number, (name, steps) in enumerate(waiting.items(), 1):
                console.print(f"[{number}/{len(waiting)}] {self.titles.get(name, name)}", style="bold", markup=False)
                side = Side(self._job(steps))
                try:
                    self._guarded(records_of[name], lambda record, side=side: self._measure_variant(record, side))
                finally:
                    side.release()
        finally:
            self.baseline_side.release()

    def _job(self, steps: Steps) -> Job:
        return Job.of(self.args, steps, self.inputs.input_ids, self.scratch, deadline=self.deadline)

    def _record(self, name: str, steps: Steps) -> dict:
        args = self.args
        return records.new_record(
            name=name, title=self.titles.get(name, name), status="interrupted", reason="the run ended here",
            model=args.source.name, device=str(args.torch_device), random_weights=args.source.random_weights,
            repro=self.repro(name), quality_protocol=self.inputs.quality_protocol,
            steps=records.resolved(steps),
        )  # fmt: skip

    def _guarded(self, record: dict, measure) -> None:
        """Run `measure(record)`; whatever ends it becomes the record's status and reason. The record is saved.

        What is no fault of the recipe (Ctrl-C, a full disk) goes on to the caller; the record then says "interrupted".
        """
        try:
            measure(record)
            record["status"], record["reason"] = "ok", None
        except RecipeError as error:
            record["status"], record["reason"] = error.status, str(error)
            if error.details and error.status == "failed":
                console.print(error.details, style="dim", markup=False)
        except ValueError as error:
            record["status"], record["reason"] = "failed", str(error)
        finally:
            self.ended[record["name"]] = record["status"]
            self.store.save(record)
        self._report_line(record)

    def _measure_baseline(self, record: dict) -> None:
        side = self.baseline_side
        self._measure_common(record, side)
        if self.inputs.windows is not None:
            record.update(self._baseline_quality(side))
            self.baseline_tokens = self._continuations(side)
            record["continuations"] = self._texts(self.baseline_tokens, None)
        with console.status("baseline: timing"):
            side.call("block")  # warm-up, discarded
            self.baseline_samples = [side.call("block") for _ in range(self.args.workload.repeats)]
        record.update(speedup=1.0, prefill_speedup=1.0, ceiling_speedup=1.0)
        self._fill_speed(record, self.baseline_samples)

    def _baseline_quality(self, side: Side) -> dict:
        """Score the baseline, or take what an earlier run of the same experiment left in the folder's cache."""
        earlier = self.store.records.get(BASELINE)
        if earlier and earlier["status"] == "ok" and self.reference_file.exists():
            return {key: earlier[key] for key in records.QUALITY_KEYS}
        with console.status("baseline: quality"):
            call = {"windows": self.inputs.windows, "reference_file": str(self.reference_file)}
            summary = side.call("score_baseline", **call)
        return {key: summary[key] for key in records.QUALITY_KEYS}

    def _measure_variant(self, record: dict, side: Side) -> None:
        self._make_room(record, side)
        self._measure_common(record, side)
        if self.inputs.windows is not None:
            with console.status(f"{record['name']}: quality"):
                summary = side.call("score_variant", reference_file=str(self.reference_file))
            record.update({key: summary[key] for key in records.QUALITY_KEYS})
            if summary["note"]:
                record["notes"] = [*(record["notes"] or []), summary["note"]]
            record["continuations"] = self._texts(self.baseline_tokens, self._continuations(side))
        with console.status(f"{record['name']}: drafting, where it drafts"):
            record["speculation"] = side.call("speculation", prompts=self.inputs.speculation)
        comparison = self._interleave(record["name"], side)
        self._fill_speed(record, comparison.variant)
        judgement.judge(record, self.baseline, comparison)
        record["axes"] = self._measure_axes(record, side)
        self.baseline_samples += comparison.baseline
        self._fill_speed(self.baseline, self.baseline_samples)
        self.store.save(self.baseline)

    def _measure_common(self, record: dict, side: Side) -> None:
        """Load, memory and size: what baseline and variants share."""
        with console.status(f"{record['name']}: loading"):
            loaded = dict(side.call("load"))
        notes = [*(record["notes"] or []), *(loaded.pop("notes") or [])]  # the first may say that loads alternate
        record.update(loaded, notes=notes or None)
        with console.status(f"{record['name']}: memory"):
            record.update(side.call("memory"))
        with console.status(f"{record['name']}: size on disk"):
            record["model_size_mb"] = side.call("size")

    def _make_room(self, record: dict, side: Side) -> None:
        """Where memory cannot hold both models, each is loaded in its turn: slow, but still interleaved."""
        self.baseline_side.rival = None
        self.baseline_side.call("load")  # turns may have ended without it: what is free beside it counts
        self.baseline_side.call("release_memory")
        needed_mb = HEADROOM * self.baseline["load_peak_memory_mb"]
        free_mb = available_memory_mb(self.args.torch_device)
        if free_mb < needed_mb:
            side.rival, self.baseline_side.rival = self.baseline_side, side
            note = f"{free_mb:.0f} MB are free and a load needs {needed_mb:.0f}: the two models are loaded in turns"
            console.print(f"  {note}", markup=False)
            record["notes"] = [note]

    def _interleave(self, name: str, side: Side, *, pairs: int = 0) -> interleave.Comparison:
        side.call("block")  # warm-up of the same shape, discarded
        with console.status(f"{name}: timing in turns with the baseline") as status:
            return interleave.interleave(
                lambda: self.baseline_side.call("block"), lambda: side.call("block"),
                pairs=max(pairs, self.args.workload.repeats), seed=self.args.seed, precision=self.args.precision,
                budget_s=self.args.budget_s, progress=lambda done: status.update(f"{name}: timing, pair {done}"),
            )  # fmt: skip

    def _measure_axes(self, record: dict, side: Side) -> list[dict] | None:
        """The other depths and batch sizes asked for; what ends one ends them all, the run's time the recipe as well."""
        points = []
        for depth, batch_size in self.args.axes:
            where = f"depth {depth}, batch {batch_size}"
            try:
                with console.status(f"{record['name']}: {where}"):
                    points.append(self._measure_point(depth, batch_size, side))
            except RecipeError as error:
                if error.status == "interrupted":
                    raise  # not finished: the next run measures it again
                note = f"{where} and what comes after it were not measured: {error}"
                record["notes"] = [*(record["notes"] or []), note]
                console.print(f"  {note}", markup=False)
                break
        return points or None

    def _measure_point(self, depth: int, batch_size: int, side: Side) -> dict:
        """A small interleaved comparison of its own."""
        where = {"depth": depth, "batch_size": batch_size}
        warm = [one.call("point", **where) for one in (self.baseline_side, side)]
        comparison = interleave.interleave(
            lambda: self.baseline_side.call("point", **where)["rates"], lambda: side.call("point", **where)["rates"],
            pairs=AXIS_PAIRS, seed=self.args.seed,
        )  # fmt: skip
        ratio = comparison.ratio("decode_tokens_per_s")
        medians = [statistics.median(sample.get("decode_tokens_per_s", 0) for sample in samples) or None
                   for samples in (comparison.baseline, comparison.variant)]  # fmt: skip
        return where | {
            "baseline_decode_tokens_per_s": medians[0], "decode_tokens_per_s": medians[1],
            "speedup": ratio and ratio.median, "speedup_ci": ratio and ratio.interval,
            "baseline_kv_cache_mb": warm[0]["kv_cache_mb"], "kv_cache_mb": warm[1]["kv_cache_mb"],
        }  # fmt: skip

    def _measure_noise_floor(self) -> None:
        """The baseline against itself: what this run would call a difference where there is none."""
        side = Side(self._job([]))
        try:
            self._make_room({}, side)
            comparison = self._interleave("A/A, the baseline against itself", side, pairs=NOISE_PAIRS)
        except RecipeError as error:
            console.print(f"  the A/A comparison ended: {error}", markup=False)
            return
        finally:
            side.release()
            self.baseline_side.rival = None
        noise = judgement.noise_floor(comparison)
        earlier = self.store.aa if any(name != BASELINE for name in self.store.records) else None
        self.store.aa = judgement.noisier(earlier, noise) if earlier else noise  # one line stands over old and new results
        for sentence in filter(None, readings.noise_sentences({"aa": self.store.aa})):
            console.print(f"  {sentence}", markup=False)

    def _fill_speed(self, record: dict, samples: list[dict]) -> None:
        judgement.fill_medians(record, samples)
        judgement.explain_speed(record, self.bandwidth_gb_per_s)

    def _continuations(self, side: Side) -> list[list[int]]:
        return side.call("continuations", prompts=self.inputs.prompt_ids, new_tokens=self.args.workload.continuation_tokens)

    def _texts(self, baseline: list[list[int]], variant: list[list[int]] | None) -> list[dict]:
        decode = self.tokenizer.decode
        rows = [{"prompt": prompt, "baseline": decode(ids)} for prompt, ids in zip(self.inputs.prompts, baseline, strict=True)]
        for row, ours, theirs in zip(rows, variant or [], baseline, strict=False):
            differing = (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
            row |= {"variant": decode(ours), "first_divergent_token": next(differing, None)}
        return rows

    def _report_line(self, record: dict) -> None:
        if record["status"] != "ok":
            console.print(f"  {record['name']}: {record['status']}: {record['reason']}", markup=False)
            return
        console.print(f"  {judgement.one_line(record)}", markup=False)
        for note in record["notes"] or []:
            console.print(f"    {note}", style="dim", markup=False)
