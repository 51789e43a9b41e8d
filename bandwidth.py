"""The machine's read bandwidth, measured: the ceiling that decode is judged by."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch

from devices import device_name, release_memory, synchronize
from records import save_json

READ_BYTES = 1_200_000_000  # well beyond any cache
REPEATS = 7


def read_bandwidth(device: torch.device, *, cache: Path, threads: int) -> dict:
    """`read_bandwidth_gb_per_s` and when it was measured, from `cache` if it holds this machine's."""
    machine = [device_name(device), torch.backends.cpu.get_cpu_capability(), str(device), threads]
    file = cache / "read_bandwidth.json"
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        if known["machine"] == machine and known["read_bandwidth_gb_per_s"]:  # none: memory was short then
            return {key: known[key] for key in ("read_bandwidth_gb_per_s", "read_bandwidth_measured")}
    except (OSError, ValueError, KeyError):
        pass
    measured = {
        "read_bandwidth_gb_per_s": measure_read_bandwidth(device),
        "read_bandwidth_measured": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    save_json(file, measured | {"machine": machine})
    return measured


def measure_read_bandwidth(device: torch.device) -> float | None:
    """GB/s (10^9) of summing 1.2 GB on `device`, best of seven; None where that much memory is not to be had."""
    try:
        values = torch.ones(READ_BYTES // 4, device=device)
        best_s = float("inf")
        for _ in range(REPEATS):
            synchronize(device)
            start = time.perf_counter()
            values.sum().item()
            best_s = min(best_s, time.perf_counter() - start)
    except (MemoryError, RuntimeError):  # RuntimeError is torch's own way to say that memory ran out
        return None
    del values
    release_memory(device)  # an accelerator's allocator would keep it, and the models need the room
    return READ_BYTES / best_s / 1e9
