"""The machine's read bandwidth, measured: the ceiling that decode is judged by."""

from __future__ import annotations

import time

import torch

from devices import synchronize

READ_BYTES = 1_200_000_000  # well beyond any cache
REPEATS = 5


def measure_read_bandwidth(device: torch.device) -> float | None:
    """GB/s (10^9) of summing 1.2 GB on `device`, best of five; None where that much memory is not to be had."""
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
    return READ_BYTES / best_s / 1e9
