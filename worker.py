"""One recipe in its own fresh process: what one model leaves behind in memory never reaches the next.

The parent holds a `WorkerProcess` and calls its commands one at a time; in between the worker waits on a pipe and uses
no CPU, so that two workers can be alive and take turns. Techniques are imported by name here, in the worker: nothing
below the pipeline knows them.
"""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import torch

import benchmark
import models
import quality
import saving
import speculation
import texts
from benchmark import Workload
from devices import MB, Unsupported, release_memory
from fitting.calibration_cache import CalibrationCache
from inference import generate_ids
from kernels import build
from kernels.build import load_kernels
from memory import PeakMemory, resident_mb
from records import file_size_mb, technique_module
from stacks import Steps
from streaming import takes_unread

# What torch says in a plain RuntimeError: on a CPU, on MPS, and on CUDA outside its allocator.
NO_MEMORY = re.compile("can't allocate memory|out of memory", re.IGNORECASE)


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
    deadline: float | None = None  # by time.time(): what is not answered by then is given up
    wikitext: bool | None = None  # whether the run found it (texts.py)

    @classmethod
    def of(cls, args, steps: Steps, input_ids: torch.Tensor, scratch: Path, *, deadline: float | None = None) -> Job:
        """With the model, machine and workload of `args` (cli.parse). The baseline has no deadline: all is compared with it."""
        return cls(args.source, steps, str(args.torch_device), args.threads, args.workload, str(scratch), input_ids,
                   deadline if steps else None, texts.wikitext_is_there())  # fmt: skip


class RecipeError(Exception):
    """A recipe that ended: `status` is the record's (unsupported, oom, failed, interrupted), the message its reason."""

    def __init__(self, status: str, reason: str, details: str = ""):
        super().__init__(reason)
        self.status = status
        self.details = details


class WorkerProcess:
    """The parent's end. `call("memory")` runs `_Worker.memory` in the process; RecipeError if that fails or dies."""

    def __init__(self, job: Job):
        self._job, self._deadline = job, job.deadline
        self.calibrated_s: float | None = None  # what applying took in a process that calibrated
        self._start()

    def _start(self) -> None:
        context = _start_method(self._job.device)
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._job), daemon=True)
        self._process.start()
        theirs.close()

    def load(self) -> dict:
        """Load the model and apply the recipe: what `_Worker.load` says of it.

        A process that calibrated is replaced by one that reads the result from the cache, as every later run of a user does:
        a heap that has held second moments and gradients stays a hundred megabytes larger than the model needs.
        """
        loaded = self.call("load")
        if not loaded.pop("calibrated"):
            return loaded
        self.calibrated_s = loaded["apply_s"]
        self.close()
        self._start()
        again = self.call("load")
        again.pop("calibrated")
        cost = f"{loaded['apply_s']:.0f} s, peak {loaded['load_peak_memory_mb']:.0f} MB"
        note = f"calibrated before, in a process of its own ({cost}); measured as read from the cache"
        return again | {"notes": [*(again["notes"] or []), note]}

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def call(self, command: str, **arguments):
        try:
            self._connection.send((command, arguments))
            if self._deadline is not None and not self._connection.poll(max(0.0, self._deadline - time.time())):
                self._process.kill()
                raise RecipeError("interrupted", f"the time for it was over during {command}")
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


def _start_method(device: str):
    """How worker processes begin: never by forking this one, whose thread pool the copy would have without its threads.

    On Linux a server process that has imported the libraries, and run nothing, is forked instead: a new worker starts in
    no time rather than the five seconds that importing torch and transformers takes. CUDA must not be forked at all.
    """
    if device != "cpu" or sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["worker"])
    return context


def _reason_of_death(exit_code: int | None, command: str) -> tuple[str, str]:
    if exit_code == -signal.SIGKILL:
        return "oom", f"the worker was killed during {command}, most likely because memory ran out"
    return "failed", f"the worker ended during {command} (exit code {exit_code})"


def _end_with_parent() -> None:
    """Else a worker whose parent was killed would calibrate on, for minutes and on every core, for nobody."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _serve(connection, job: Job) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    gc.freeze()  # what is imported is never garbage, and half a second of each collection
    worker = _Worker(job)
    while True:
        try:
            command, arguments = connection.recv()
        except (EOFError, OSError):
            return  # the parent has closed its end
        try:
            reply = ("ok", getattr(worker, command)(**arguments))
        except FloatingPointError as error:
            reply = ("error", "failed", f"{error}; {worker.first_bad_layer()}", "")
        except Exception as error:  # whatever a recipe raises becomes its record's reason; the parent goes on
            reply = ("error", *_classify(error), traceback.format_exc())
        connection.send(reply)


def _classify(error: Exception) -> tuple[str, str]:
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, Unsupported):
        return "unsupported", reason
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or NO_MEMORY.search(reason):
        return "oom", reason
    if isinstance(error, ValueError):
        return "failed", reason
    return "failed", f"{type(error).__name__}: {reason}"


class _Worker:
    """The commands, in the order a recipe runs them."""

    def __init__(self, job: Job):
        self.job = job
        self.device = torch.device(job.device)
        torch.set_num_threads(job.threads)
        texts.settle_wikitext(job.wikitext)
        self.model = None
        self.runtime_mb = 0.0
        self.phases: dict = {}

    def load(self) -> dict:
        """Load, then apply each step, each with its own peak. What is resident before is the runtime's share.

        Where the first technique takes its weights from the file (streaming.py), "load" is the model without its matrices,
        and "apply" reads and converts them: load_s + apply_s, and the larger peak of the two, are what a user waits for and
        needs. Elsewhere "load" ends with the whole float32 model in memory.
        """
        steps = [(technique_module(technique).apply, options) for technique, options in self.job.steps]
        torch.ones(256, 256).matmul(torch.ones(256, 256))  # the first product maps the BLAS libraries
        load_kernels()  # a library as well
        release_memory(self.device)
        self.runtime_mb = resident_mb() if self.device.type == "cpu" else 0.0
        read = not steps or not takes_unread(steps[0][0])
        with PeakMemory(self.device) as load_peak:
            start = time.perf_counter()
            self.model = models.load_model(self.job.source, device=self.device, seed=self.job.workload.seed, read=read)
            load_s = time.perf_counter() - start
        self.phases["load_peak_mb"] = load_peak.peak_mb - self.runtime_mb
        with PeakMemory(self.device) as apply_peak:
            start = time.perf_counter()
            for apply, options in steps:
                self.model = apply(self.model, **options)
            apply_s = time.perf_counter() - start
        self.phases["apply_peak_mb"] = apply_peak.peak_mb - self.runtime_mb if steps else None
        release_memory(self.device)
        compiled = []
        if seconds := build.spent.get("compiling_s"):
            compiled.append(f"C++ kernels compiled in {seconds:.0f} s, once a machine, in no other figure")
        return {
            "load_s": load_s,
            "apply_s": apply_s if steps else None,
            "load_peak_memory_mb": max(load_peak.peak_mb, apply_peak.peak_mb) - self.runtime_mb,
            "runtime_memory_mb": self.runtime_mb or None,
            "weights_mb": benchmark.weight_bytes(self.model) / MB,
            "parameters": benchmark.count_parameters(self.model),
            "dtype": benchmark.main_dtype(self.model),
            "evidence": benchmark.evidence(self.model) | {"streamed_bytes": benchmark.streamed_bytes(self.model)},
            "notes": [*getattr(self.model, "notes", []), *compiled] or None,
            "calibrated": CalibrationCache.saved > 0,
        }

    def release_memory(self) -> None:
        """Give back what this process keeps for later: beside it another model is to be loaded."""
        release_memory(self.device)

    def memory(self) -> dict:
        """Peaks of prefill and decode above the runtime, in a pass of its own, what of the peak has a name, and what is read
        for a token."""
        work = self.job.workload
        measured = benchmark.measure_memory(self.model, self._inputs(), new_tokens=work.new_tokens, depth=work.depth)
        for phase in ("prefill_peak_mb", "decode_peak_mb"):
            self.phases[phase] = measured[phase] - self.runtime_mb
        peak = max(self.phases["prefill_peak_mb"], self.phases["decode_peak_mb"])
        cache_mb, streamed_bytes = measured["kv_cache_mb"], benchmark.streamed_bytes(self.model)
        named = benchmark.weight_bytes(self.model) / MB + cache_mb
        self.phases |= {"method": measured["method"], "interval_ms": measured["interval_ms"], "unnamed_mb": peak - named}
        return {
            "peak_memory_mb": peak, "kv_cache_mb": cache_mb, "memory_phases": self.phases,
            "bytes_per_token": work.bytes_per_token(streamed_bytes, cache_mb, measured["tokens_per_pass"]),
        }  # fmt: skip

    def size(self) -> float | None:
        """MB of the files that hold the model, really written (and deleted again); None where the disk has no room."""
        needed = benchmark.weight_bytes(self.model)
        if shutil.disk_usage(self.job.scratch_dir).free < 1.1 * needed + 1e9:
            return None
        try:
            with tempfile.TemporaryDirectory(dir=self.job.scratch_dir) as folder:
                saving.save_model(self.model, Path(folder))
                return file_size_mb(Path(folder))
        except OSError:
            return None

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

    def speculation(self, prompts: dict[str, list[list[int]]]) -> dict | None:
        """What drafting gains on prompts of each kind; None for a decode loop that does not draft."""
        return speculation.measure(self.model, prompts, pairs=self.job.workload.draft_pairs)

    def block(self) -> dict[str, float]:
        """One timed generation."""
        work = self.job.workload
        return self.point(depth=work.depth, batch_size=work.batch_size)["rates"]

    def point(self, depth: int, batch_size: int) -> dict:
        """One timed generation of `batch_size` sequences with `depth` tokens before the prompt."""
        work = self.job.workload
        ids = self._inputs(depth, batch_size)
        timing = benchmark.time_generation(self.model, ids, new_tokens=work.new_tokens, depth=depth)
        return {"rates": timing.rates(work.prompt_tokens), "kv_cache_mb": timing.kv_cache_bytes / MB}

    def first_bad_layer(self) -> str:
        """Which layer's output first stops being finite: where to look."""
        try:
            name = benchmark.first_non_finite_module(self.model, self._inputs())
        except Exception as error:  # of what went wrong already, the first reason counts
            return f"where it began could not be found ({type(error).__name__})"
        return f"first in {name}" if name else "no layer of a plain forward pass shows it"

    def _inputs(self, depth: int | None = None, batch_size: int | None = None) -> torch.Tensor:
        work = self.job.workload
        length = (work.depth if depth is None else depth) + work.prompt_tokens
        return self.job.input_ids[: batch_size or work.batch_size, :length].to(self.device)
