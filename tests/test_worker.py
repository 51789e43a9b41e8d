"""Workers: what they answer, how they fail, and that a waiting one leaves the machine alone."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from pipeline_model import save_tiny_model

import measurement
import models
import worker
from benchmark import Workload
from worker import Job, RecipeError, WorkerProcess

WORK = Workload(prompt_tokens=8, new_tokens=4, repeats=5)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return models.find_model(str(save_tiny_model(tmp_path_factory.mktemp("model"))))


def job(source, tmp_path: Path, steps=()):
    ids = torch.randint(1, 256, (3, 40))
    return Job(
        source=source, steps=list(steps), device="cpu", threads=1, workload=WORK, scratch_dir=str(tmp_path), input_ids=ids
    )


def test_a_waiting_worker_uses_no_cpu(source, tmp_path):
    """Two workers take turns on the same cores: one that waits must not spin. Also: what a worker answers."""
    with WorkerProcess(job(source, tmp_path, [("prompt_lookup", {})])) as worker:
        loaded = worker.call("load")
        assert loaded["parameters"] == sum(p.numel() for p in models.load_model(source).parameters())
        assert worker.call("size") == pytest.approx(loaded["weights_mb"], rel=0.05)
        rates = worker.call("block")
        assert set(rates) == {"ttft_ms", "prefill_tokens_per_s", "tpot_ms", "decode_tokens_per_s"}
        deep = worker.call("point", depth=20, batch_size=3)
        assert deep["kv_cache_mb"] == pytest.approx(2 * 2 * 2 * 16 * 4 * 3 * (20 + 8 + 4 - 1) / 1e6)
        assert worker.call("speculation", prompts={"free": [[1, 2, 3]]})["free"]["tokens_per_pass"] >= 1
        process = psutil.Process(worker.pid)
        time.sleep(0.5)  # OpenMP's threads spin for a moment after their last loop
        before = sum(process.cpu_times()[:2])
        time.sleep(1.5)
        assert sum(process.cpu_times()[:2]) - before < 0.05


def test_a_process_that_calibrated_is_replaced_by_one_that_reads_the_result(source, tmp_path, monkeypatch):
    said = {"apply_s": 60.0, "load_peak_memory_mb": 900.0, "notes": ["int4"]}
    answers = iter([said | {"calibrated": True}, said | {"apply_s": 2.0, "calibrated": False}])
    with WorkerProcess(job(source, tmp_path)) as worker:
        assert worker.call("load")["calibrated"] is False
        first = worker.pid
        monkeypatch.setattr(worker, "call", lambda command: next(answers))
        loaded = worker.load()
        assert worker.pid != first and worker.alive and loaded["apply_s"] == 2.0 and "calibrated" not in loaded
        assert worker.calibrated_s == 60.0
        assert loaded["notes"][0] == "int4" and "in a process of its own (60 s, peak 900 MB)" in loaded["notes"][1]


def test_a_killed_worker_is_named_and_can_be_started_again(source, tmp_path):
    side = measurement.Side(job(source, tmp_path))
    side.call("load")
    psutil.Process(side.worker.pid).kill()
    with pytest.raises(RecipeError, match="killed during block") as caught:
        side.worker.call("block")
    assert caught.value.status == "oom"
    assert side.call("block")["decode_tokens_per_s"] > 0
    side.release()


@pytest.mark.parametrize("error, status", [
    (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), "oom"),
    (RuntimeError("CUDA error: out of memory"), "oom"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "oom"),
    (RuntimeError("shapes do not match"), "failed"),
])  # fmt: skip
def test_lack_of_memory_is_known_by_what_torch_says(error, status):
    assert worker._classify(error)[0] == status


def test_the_baseline_is_loaded_when_free_memory_is_read(monkeypatch):
    """A recipe that took turns may have ended without it: what is free then would hold one model, not two."""
    calls = []

    class Recorded(measurement.Side):
        def call(self, command, **arguments):
            calls.append((command, self.rival))

    baseline, side = Recorded(None), Recorded(None)
    baseline.rival = side
    args = SimpleNamespace(torch_device="cpu")
    run = SimpleNamespace(baseline_side=baseline, baseline={"load_peak_memory_mb": 4400.0}, args=args)
    monkeypatch.setattr(measurement, "available_memory_mb", lambda device: 1000.0 if calls else 6500.0)
    measurement.Measurement._make_room(run, record := {}, side)
    assert (
        calls == [("load", None), ("release_memory", None)]
        and side.rival is baseline
        and "loaded in turns" in record["notes"][0]
    )


def test_two_models_that_do_not_fit_are_loaded_in_turns(source, tmp_path):
    """With a rival, one side's worker is gone before the other's loads."""
    first, second = measurement.Side(job(source, tmp_path)), measurement.Side(job(source, tmp_path))
    first.rival, second.rival = second, first
    first.call("block")
    second.call("block")
    assert first.worker is None and second.worker.alive
    second.release()


def test_a_baseline_that_could_not_be_loaded_again_is_not_taken_for_loaded(monkeypatch):
    """Its process lives on after the error; the next recipe must load it anew, and may find room."""
    rooms = iter([False, True])

    class Process:
        alive = True

        def __init__(self, job):
            self.loaded = False

        def load(self):
            if not next(rooms):
                raise RecipeError("oom", "no room")
            self.loaded = True
            return {"weights_mb": 1.0}

        def call(self, command):
            return self.loaded

        def close(self):
            pass

    monkeypatch.setattr(measurement, "WorkerProcess", Process)
    side = measurement.Side(None)
    with pytest.raises(RecipeError, match="no room"):
        side.call("load")
    assert side.call("load") == {"weights_mb": 1.0} and side.call("memory") is True


def test_time_that_ends_between_depths_leaves_the_recipe_unfinished(monkeypatch):
    """Else the next run would skip it, and the depths would never be measured; memory that ends is only noted."""
    run = object.__new__(measurement.Measurement)
    run.args = SimpleNamespace(axes=[(512, 1), (1536, 1)])
    status = "interrupted"

    def fail(depth, batch_size, side):
        raise RecipeError(status, "over")

    run._measure_point = fail
    with pytest.raises(RecipeError, match="over"):
        run._measure_axes({"name": "int8", "notes": None}, None)
    status = "oom"
    record = {"name": "int8", "notes": None}
    assert run._measure_axes(record, None) is None and "depth 512" in record["notes"][0]


def test_a_worker_takes_the_texts_that_the_run_found(source, tmp_path, monkeypatch):
    monkeypatch.setattr(worker.texts, "_wikitext_is_there", False)
    made = Job.of(SimpleNamespace(source=source, torch_device="cpu", threads=1, workload=WORK), [], None, tmp_path)
    monkeypatch.setattr(worker.texts, "_wikitext_is_there", None)
    assert made.wikitext is False
    worker._Worker(made)
    assert worker.texts.wikitext_is_there() is False


def test_what_takes_too_long_is_given_up(source, tmp_path):
    """A recipe ends when its time does, and is no failure; the baseline, which all is compared with, has no end."""
    late = replace(job(source, tmp_path), deadline=time.time() - 1)
    with WorkerProcess(late) as slow, pytest.raises(RecipeError, match="time for it was over during load") as ended:
        slow.call("load")
    assert ended.value.status == "interrupted"
    args = SimpleNamespace(source=source, torch_device="cpu", threads=1, workload=WORK)
    assert Job.of(args, [], None, tmp_path, deadline=5.0).deadline is None
    assert Job.of(args, [("lean_decode", {})], None, tmp_path, deadline=5.0).deadline == 5.0
