"""Peak memory of a phase: what it added on top of the interpreter and its libraries, at its highest moment.

On Linux the kernel itself keeps the peak of the resident set (VmHWM) and lets a process reset it, so nothing has to
be sampled. Elsewhere a thread samples the resident set every 10 ms, and the record says so. On CUDA, and on MPS where
torch offers it, the allocator keeps its own peak; else the allocator is sampled. Runs that are timed are never
measured here: a sampler costs time.
"""

from __future__ import annotations

import threading
from pathlib import Path

import psutil
import torch

from devices import MB, release_memory, synchronize

SAMPLING_INTERVAL_MS = 10


def resident_mb() -> float:
    """Resident set of this process (MB = 10^6 bytes): includes mapped files once they have been touched."""
    return psutil.Process().memory_info().rss / MB


class PeakMemory:
    """`with PeakMemory(device) as peak: ...` then `peak.peak_mb`: the highest memory in use within the block, in MB.

    For a CPU that is the resident set of the whole process: subtract `resident_mb()` taken before the model was loaded.
    For CUDA and MPS it is what torch's allocator has handed out, which starts from zero.
    `method` names the counter and `interval_ms` is 0 where the counter is exact.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.peak_mb = 0.0
        self.method, self.interval_ms = _method(device)

    def __enter__(self) -> PeakMemory:
        synchronize(self.device)
        release_memory(self.device)
        if self.method == "allocator peak":
            torch.accelerator.reset_peak_memory_stats()
        elif self.method == "VmHWM":
            Path("/proc/self/clear_refs").write_text("5")
        else:
            self._stop = threading.Event()
            self._sampler = threading.Thread(target=self._sample, daemon=True)
            self._sampler.start()
        return self

    def __exit__(self, *exception) -> None:
        synchronize(self.device)
        if self.method == "allocator peak":
            self.peak_mb = torch.accelerator.max_memory_allocated() / MB
        elif self.method == "VmHWM":
            self.peak_mb = _vm_hwm_mb()
        else:
            self._stop.set()
            self._sampler.join()

    def _sample(self) -> None:
        while True:
            self.peak_mb = max(self.peak_mb, self._now_mb())
            if self._stop.wait(SAMPLING_INTERVAL_MS / 1000):
                self.peak_mb = max(self.peak_mb, self._now_mb())
                return

    def _now_mb(self) -> float:
        return torch.mps.current_allocated_memory() / MB if self.device.type == "mps" else resident_mb()


def _method(device: torch.device) -> tuple[str, int]:
    if device.type != "cpu":
        try:
            torch.accelerator.reset_peak_memory_stats()
            torch.accelerator.max_memory_allocated()
        except (RuntimeError, NotImplementedError, AttributeError):  # MPS got these counters only in recent torch
            return "sampled allocator", SAMPLING_INTERVAL_MS
        return "allocator peak", 0
    try:
        Path("/proc/self/clear_refs").write_text("5")  # needs CONFIG_PROC_PAGE_MONITOR; refused in some containers
        _vm_hwm_mb()
        return "VmHWM", 0
    except (OSError, StopIteration):
        return "sampled resident set", SAMPLING_INTERVAL_MS


def _vm_hwm_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / MB
