"""A whole run by hand: which side is divided by which, and what becomes of every reading. Its workers only pretend."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import measurement
from benchmark import Workload
from inputs import Inputs
from measurement import Measurement
from models import ModelSource
from store import ResultsFolder


class PretendingWorker:
    """The baseline reads 400 MB a token at 10 tokens/s, any recipe 100 MB at 25; prefill, memory and caches differ as well."""

    alive = True

    def __init__(self, job):
        self.recipe = bool(job.steps)

    def close(self):
        pass

    def load(self):
        mb = 100.0 if self.recipe else 400.0
        return {
            "load_s": 1.0, "apply_s": None, "load_peak_memory_mb": mb, "runtime_memory_mb": 1.0, "weights_mb": mb,
            "parameters": 1, "dtype": "float32", "evidence": {}, "notes": None,
        }  # fmt: skip

    def call(self, command, **_):
        decode, prefill, tpot_ms = (25.0, 150.0, 40.0) if self.recipe else (10.0, 100.0, 100.0)
        rates = {"decode_tokens_per_s": decode, "prefill_tokens_per_s": prefill, "ttft_ms": 5.0, "tpot_ms": tpot_ms}
        peak, cache, streamed = (60.0, 1.0, 100e6) if self.recipe else (100.0, 4.0, 400e6)
        memory = {"peak_memory_mb": peak, "kv_cache_mb": cache, "memory_phases": {}, "bytes_per_token": streamed}
        return {
            "block": rates, "point": {"rates": rates, "kv_cache_mb": cache}, "size": 1.0, "memory": memory,
            "release_memory": None, "speculation": None,
        }[command]  # fmt: skip


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A measurement of random weights at depth 0 and 512, on 10 GB/s."""
    monkeypatch.setattr(measurement, "WorkerProcess", PretendingWorker)
    monkeypatch.setattr(measurement, "available_memory_mb", lambda device: 1e9)
    args = SimpleNamespace(
        workload=Workload(repeats=6), axes=[(512, 1)], seed=0, precision=0.5, budget_s=1.0, threads=1,
        torch_device=torch.device("cpu"), source=ModelSource("tiny", "random", ""),
    )  # fmt: skip
    store = ResultsFolder(tmp_path, environment={}, workload={}, identity={})
    yield Measurement(
        args, prepared=Inputs(torch.ones(1, 8, dtype=torch.long), [], [], None, None), tokenizer=None, store=store,
        scratch=tmp_path, titles={}, repro=str, bandwidth_gb_per_s=10.0,
    )  # fmt: skip
    store.close()


def test_a_run_by_hand(run):
    """Ratios are recipe over baseline for speed; what is read of the bandwidth follows from the recipe's own bytes and time."""
    run.measure_all({"int8": [("quantization", {})]}, aa=False)
    recipe, baseline = run.store.records["int8"], run.store.records["baseline"]
    assert (recipe["speedup"], recipe["prefill_speedup"], recipe["ceiling_speedup"]) == (2.5, 1.5, 4.0)
    assert recipe["speedup_ci"] == [2.5, 2.5] and (recipe["verdict"], recipe["smallest_resolved"]) == ("faster", 0)
    assert (recipe["decode_tokens_per_s"], baseline["decode_tokens_per_s"]) == (25.0, 10.0)
    # 100 MB at 10 GB/s are 10 of the 40 ms a token takes; of the 3 that bytes allow beyond 1, 1.5 were had.
    assert (recipe["mbu"], recipe["overhead_ms"], recipe["captured"]) == pytest.approx((0.25, 30.0, 0.5))
    assert recipe["targets_met"] == {"speed": True, "memory": True, "quality": None, "all": None}
    assert "2.50x, where its bytes alone (100 MB a token) give 4.00x; it uses 25% of" in recipe["explanation"]
    (point,) = recipe["axes"]
    readings = ("speedup", "baseline_decode_tokens_per_s", "decode_tokens_per_s", "baseline_kv_cache_mb", "kv_cache_mb")
    assert [point[key] for key in ("depth", "batch_size", *readings)] == [512, 1, 2.5, 10.0, 25.0, 4.0, 1.0]


def test_the_noise_floor_of_a_run_and_of_what_it_goes_on_from(run):
    run.measure_all({"int8": [("quantization", {})]}, aa=True)
    assert run.store.aa["trustworthy"] and (run.store.aa["speedup"], run.store.aa["pairs"]) == (1.0, 8)
    run.store.aa = run.store.aa | {"trustworthy": False}
    run.measure_all({"half": [("mixed_precision", {})]}, aa=True)
    assert run.store.aa["trustworthy"] is False, "the worse of the two stands over all results"
