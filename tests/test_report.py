"""The report is judged by what a reader sees. All numbers here are invented."""

import copy
import io
import json
import shutil
import struct

import pytest
from rich.console import Console

import charts
import report

QUALITY = ["perplexity", "perplexity_retention", "perplexity_retention_ci", "kl_divergence", "top1_agreement"]
REASON = "oneDNN has no int8 matrix product for <this CPU> | see README"


def record(name, title, *, speed, factor=None, prefill=100, peak=5000, size=4400, weights=4400, kept=1.0, **more):
    """One measured recipe, with the spread and intervals that a real run has."""
    share = [round(kept - 0.004, 4), round(min(1.01, kept + 0.004), 4)]
    return {
        "name": name,
        "title": title,
        "status": "ok",
        "reason": None,
        "model": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        "device": "cpu",
        "dtype": "float32",
        "random_weights": False,
        "decode_tokens_per_s": speed,
        "prefill_tokens_per_s": prefill,
        "samples": {"decode_tokens_per_s": [speed * part for part in (0.96, 0.99, 1.0, 1.01, 1.03)]},
        "peak_memory_mb": peak,
        "weights_mb": weights,
        "kv_cache_mb": 11.5,
        "model_size_mb": size,
        "perplexity": 8.0 / kept,
        "perplexity_retention": kept,
        "perplexity_retention_ci": share,
        "bytes_per_token": weights * 1e6 * 0.94,
        "ceiling_speedup": 4400 / weights,
        "speedup": factor,
        "speedup_ci": factor and [round(factor * 0.97, 3), round(factor * 1.02, 3)],
        "prefill_speedup": prefill / 100,
        "prefill_speedup_ci": [prefill / 104, prefill / 97],
        "verdict": factor and ("faster" if factor > 1 else "slower"),
        "targets_met": {"speed": bool(factor and factor >= 1.6), "memory": peak <= 3250, "quality": kept >= 0.97},
        **more,
    }


def fill(consolidated):
    """Set what follows from the three targets."""
    for entry in consolidated["results"]:
        met = entry.get("targets_met")
        if met:
            met["all"] = all(met.values())
    return consolidated


@pytest.fixture
def results():
    """Eight recipes: six measured, one that failed, one that this machine cannot run."""
    mixed = dict(speed=12.6, factor=1.47, prefill=410, peak=2700, size=2200, weights=2200, kept=0.9993)
    int8 = dict(speed=21.9, factor=2.94, prefill=380, peak=1750, size=1240, weights=1240, kept=0.9954)
    pruned = dict(speed=7.1, factor=1.043, prefill=106, peak=4700, size=4190, weights=4190, kept=0.9431)
    cache = dict(speed=6.4, factor=0.985, prefill=97, peak=4990, size=4400, kept=0.9991)
    every = dict(speed=22.4, factor=3.05, prefill=371, peak=1690, size=1180, weights=1180, kept=0.9389)
    broken = {"decode_tokens_per_s": None, "perplexity": None, "speedup": None, "targets_met": None}
    classic = {"name": "int8_classic", "title": "INT8 dynamic (classic)", "status": "unsupported", "reason": REASON}
    failed = {"name": "bf16+kv8", "title": "BF16 + INT8 KV cache", "status": "failed", "reason": "exit code 1", **broken}
    return fill(
        {
            "schema_version": 1,
            "environment": {
                "cpu": "Imaginary 9000 @ 2.60GHz",
                "gpu": None,
                "cores": 4,
                "threads": 2,
                "ram_gb": 15.6,
                "os": "Linux",
                "torch": "2.13.0",
                "transformers": "5.23.0",
                "time": "2031-02-03T04:05:06+00:00",
                "read_bandwidth_gb_per_s": 29.1,
            },
            "workload": {
                "prompt_tokens": 128,
                "new_tokens": 128,
                "depth": 0,
                "batch_size": 1,
                "repeats": 5,
                "quality": {"windows": 16, "window": 512, "text": "Lee news corpus (last 100 documents)"},
            },
            "targets": {"decode_speedup": 1.6, "memory_change": -0.35, "perplexity_retention": 0.97},
            "aa": {
                "speedup": 1.001,
                "speedup_ci": [0.985, 1.012],
                "prefill_speedup": 0.997,
                "prefill_speedup_ci": [0.97, 1.02],
                "trustworthy": True,
            },
            "results": [
                record("baseline", "Baseline (float32)", speed=6.5),
                record("mixed_precision", "Mixed precision (bfloat16)", **mixed),
                record("int8", "INT8 weights and activations", **int8),
                classic,
                record("head_pruning", "Head pruning (12.5 %)", **pruned),
                record("kv_cache_int8", "INT8 KV cache", **cache),
                failed,
                record("prune+int8+kv8", "Head pruning + INT8 weights + INT8 KV cache", **every),
            ],
        }
    )
