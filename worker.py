"""One recipe in its own fresh process: what one model leaves behind in memory never reaches the next.

The parent holds a `WorkerProcess` and calls its commands one at a time; in between the worker waits on a pipe and uses
no CPU, so that two workers can be alive and take turns. Techniques are imported by name here, in the worker: nothing
below the pipeline knows them.
"""

from __future__ import annotations

import importlib
import multiprocessing
import shutil
import signal
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import torch

import benchmark
import models
import quality
import saving
from benchmark import Workload
from devices import MB, Unsupported, release_memory
from inference import generate_ids
from memory import PeakMemory, resident_mb
from records import file_size_mb

Steps = list[tuple[str, dict]]


@dataclass(frozen=True)
class Job:
    """What a worker loads and does: the model, the recipe's steps in order, and where it runs."""

    source: models.ModelSource
    steps: Steps
    device: str
    threads: int
    workload: Workload
    scratch_dir: str
    input_ids: torch.Tensor = field(repr=False, default=None)


class RecipeError(Exception):
    """A recipe that ended: `status` is the record's (unsupported, oom, failed), the message its reason."""

    def __init__(self, status: str, reason: str, details: str = ""):
        super().__init__(reason)
        self.status = status
        self.details = details


class WorkerProcess:
    """The parent's end. `call("memory")` runs `_Worker.memory` in the process; raises RecipeError if that fails or dies."""

    def __init__(self, job: Job):
        context = multiprocessing.get_context("spawn")  # fork would copy torch's thread pool without its threads
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, job), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def call(self, command: str, **arguments):
        try:
            self._connection.send((command, arguments))
            outcome = self._connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join(5)
            raise RecipeError(*_reason_of_death(self._process.exitcode, command)) from None
        if outcome[0] == "error":
            raise RecipeError(*outcome[1:])
        return outcome[1]

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._connection.close()
        self._process.join(2)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def _reason_of_death(exit_code: int | None, command: str) -> tuple[str, str]:
    if exit_code == -signal.SIGKILL:
        return "oom", f"the worker was killed during {command}, most likely because memory ran out"
    return "failed", f"the worker ended during {command} (exit code {exit_code})"


def _serve(connection, job: Job) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    worker = _Worker(job)
    while True:
        try:
            command, arguments = connection.recv()
        except (EOFError, OSError):
            return  # the parent is gone or has closed its end
        try:
            reply = ("ok", getattr(worker, command)(**arguments))
        except Exception as error:  # whatever a recipe raises becomes its record's reason; the parent goes on
            reply = ("error", *_classify(error), traceback.format_exc())
        connection.send(reply)


def _classify(error: Exception) -> tuple[str, str]:
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, Unsupported):
        return "unsupported", reason
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in reason:
        return "oom", reason
    if isinstance(error, ValueError | FloatingPointError):
        return "failed", reason
    return "failed", f"{type(error).__name__}: {reason}"


class _Worker:
    """The commands, in the order a recipe runs them."""

    def __init__(self, job: Job):
        self.job = job
        self.device = torch.device(job.device)
        torch.set_num_threads(job.threads)
        self.model = None
        self.runtime_mb = 0.0

    def load(self) -> dict:
        """Load, then apply each step. What is resident before that is the runtime's share, not the model's."""
        torch.ones(256, 256).matmul(torch.ones(256, 256))  # the first product maps the BLAS libraries
        self.runtime_mb = resident_mb() if self.device.type == "cpu" else 0.0
        with PeakMemory(self.device) as peak:
            start = time.perf_counter()
            self.model = models.load_model(self.job.source, device=self.device, seed=self.job.workload.seed)
            loaded = time.perf_counter()
            for technique, options in self.job.steps:
                self.model = importlib.import_module(f"optimizations.{technique}").apply(self.model, **options)
            applied = time.perf_counter()
        release_memory(self.device)
        return {
            "load_s": loaded - start,
            "apply_s": applied - loaded if self.job.steps else None,
            "load_peak_memory_mb": peak.peak_mb - self.runtime_mb,
            "runtime_memory_mb": self.runtime_mb or None,
            "weights_mb": benchmark.weight_bytes(self.model) / MB,
            "parameters": benchmark.count_parameters(self.model),
            "dtype": benchmark.main_dtype(self.model),
            "evidence": benchmark.evidence(self.model),
            "notes": getattr(self.model, "notes", None),
            "streamed_bytes": benchmark.streamed_bytes(self.model),
        }

    def memory(self) -> dict:
        """Peak of prefill + decode above the runtime, in a pass of its own."""
        work = self.job.workload
        phases = benchmark.measure_memory(self.model, self._inputs(), new_tokens=work.new_tokens, depth=work.depth)
        for phase in ("prefill_peak_mb", "decode_peak_mb"):
            phases[phase] -= self.runtime_mb
        peak = max(phases["prefill_peak_mb"], phases["decode_peak_mb"])
        return {"peak_memory_mb": peak, "kv_cache_mb": phases["kv_cache_mb"], "memory_phases": phases}

    def size(self) -> float | None:
        """MB of the files that hold the model, really written; None where the disk has no room for them."""
        needed = benchmark.weight_bytes(self.model)
        if shutil.disk_usage(self.job.scratch_dir).free < 1.1 * needed + 1e9:
            return None
        with tempfile.TemporaryDirectory(dir=self.job.scratch_dir) as folder:
            saving.save_model(self.model, Path(folder))
            return file_size_mb(Path(folder))

    def score_baseline(self, windows: torch.Tensor, reference_file: str) -> dict:
        reference = quality.score_baseline(self.model, windows, chunk=self.job.workload.quality_chunk)
        reference.save(Path(reference_file))
        return quality.baseline_summary(reference)

    def score_variant(self, reference_file: str) -> dict:
        reference = quality.Reference.load(Path(reference_file), chunk=self.job.workload.quality_chunk)
        return quality.score_variant(self.model, reference)

    def continuations(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        """Greedy continuations through transformers' `generate`: what a user gets."""
        rows = (torch.tensor([prompt], device=self.device) for prompt in prompts)
        return [generate_ids(self.model, row, max_new_tokens=new_tokens)[0, row.shape[1] :].tolist() for row in rows]

    def block(self) -> dict[str, float]:
        """One timed generation."""
        work = self.job.workload
        timing = benchmark.time_generation(self.model, self._inputs(), new_tokens=work.new_tokens, depth=work.depth)
        return timing.rates(work.prompt_tokens)

    def _inputs(self) -> torch.Tensor:
        return self.job.input_ids.to(self.device)
