"""The one place that knows about devices: choosing one, waiting for it, its memory and its half precision.

Everything above asks here, so that a CUDA, MPS or CPU difference is written down once.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import platform
import subprocess
import sys
from pathlib import Path

import psutil

# Weights in huge pages: a decode step walks through gigabytes, and with 4 kB pages it also walks through page tables. torch
# reads this at its first allocation, and worker processes inherit it.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "tinyllama-optimization"  # made once a machine
CGROUP = Path("/sys/fs/cgroup")
MB = 1e6  # megabytes are powers of ten everywhere in this project
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt's names, from glibc's malloc.h
KEPT_FREE_BYTES, OWN_MAPPING_BYTES = 256 << 20, 32 << 20  # the second is the largest that glibc takes


def _libc() -> ctypes.CDLL | None:
    with contextlib.suppress(OSError):  # musl and others: no such file, and little is kept there
        return ctypes.CDLL("libc.so.6") if sys.platform == "linux" else None


def _keep_freed_activations() -> None:
    """Else glibc hands the end of the heap back after each layer and gets it anew, zeroed page by page, at the next one: 35,000
    page faults, or 5-14 % of a prefill of TinyLlama in bf16. `trim_heap` still gives everything back when it is asked."""
    if (libc := _libc()) is not None:
        with contextlib.suppress(AttributeError):
            libc.mallopt(M_MMAP_THRESHOLD, OWN_MAPPING_BYTES)
            libc.mallopt(M_TRIM_THRESHOLD, KEPT_FREE_BYTES)


_keep_freed_activations()


def pick_device(name: str = "auto") -> torch.device:
    """`auto` picks CUDA, then MPS, then CPU. Raises ValueError, in one sentence, for a device this machine lacks."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(device for device in ("cuda", "mps", "cpu") if available[device])
    if name not in available:
        raise ValueError(f"--device {name}: choose from auto, cpu, cuda, mps")
    if not available[name]:
        usable = ", ".join(device for device, present in available.items() if present)
        raise ValueError(f"--device {name}: this machine and this build of torch offer only {usable}")
    return torch.device(name)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished: without it a timer reads how fast work was queued."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def release_memory(device: torch.device) -> None:
    """Give freed blocks back, so that a reading of memory sees what is alive rather than what was."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
    else:
        trim_heap()


def trim_heap() -> None:
    """Make glibc hand back the freed blocks it keeps; cheap enough to be called after every layer."""
    if (libc := _libc()) is not None:
        with contextlib.suppress(AttributeError):
            libc.malloc_trim(0)


def require_float64(device: torch.device) -> None:
    """Raises Unsupported where closed forms cannot be solved; what another device calibrated is found in the cache first."""
    if device.type == "mps":
        raise Unsupported(
            "calibration needs float64, which MPS lacks: run the same once with --device cpu -o elsewhere, then again "
            "with --no-resume: the result is kept"
        )


def available_memory_mb(device: torch.device) -> float:
    """What a new model could use now, in MB; for MPS the machine's own memory, which it shares."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / MB
    available, limit = psutil.virtual_memory().available, _of_container("memory.max")
    if limit.isdigit():  # pages of files count as used there, but give way
        kept = dict(line.split() for line in _of_container("memory.stat").splitlines())
        available = min(available, int(limit) - int(_of_container("memory.current")) + int(kept.get("inactive_file", 0)))
    return available / MB


def _of_container(file: str) -> str:
    """What the control group of this process says (Linux, version 2); "" where there is none."""
    with contextlib.suppress(OSError):
        return (CGROUP / file).read_text().strip()
    return ""


def device_name(device: torch.device) -> str:
    """The processor's own name, e.g. `AMD EPYC 7763` or `NVIDIA H100`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


@functools.cache
def cpu_name() -> str:
    """The CPU's marketing name where the system tells it, else its architecture."""
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@functools.cache
def cpu_features() -> dict[str, bool]:
    """What this CPU's vector units can do that matters here; a probe missing from this torch reads False."""
    probes = {
        "avx512": "_is_avx512_supported",
        "vnni": "_is_vnni_supported",
        "avx512_bf16": "_is_avx512_bf16_supported",
        "amx": "_is_amx_tile_supported",
        "amx_fp16": "_is_amx_fp16_supported",
    }
    return {name: bool(getattr(torch.cpu, probe, lambda: False)()) for name, probe in probes.items()}


def has_half_arithmetic(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether products in `dtype` run in hardware on `device`, and a sentence that says why or why not.

    A CPU without it still profits from *storing* weights in bf16 (half the bytes per decoded token), but multiplies in fp32: a
    prompt gains only what PyTorch's float32 product leaves unused. In fp16 it converts in software and loses on both.
    """
    if device.type == "cuda" and dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        return False, "this GPU only emulates bfloat16"
    if device.type != "cpu":
        return True, f"{device.type} multiplies {dtype} in hardware"
    if platform.machine() in ("arm64", "aarch64"):
        native = _arm_has(*{torch.bfloat16: ("bf16", "FEAT_BF16"), torch.float16: ("asimdhp", "FEAT_FP16")}[dtype])
        return native, f"ARM vector units multiply {dtype}" if native else f"this ARM CPU has no arithmetic in {dtype}"
    features = cpu_features()
    if dtype == torch.bfloat16:
        native = features["avx512_bf16"] or features["amx"]
        return native, "AVX512-BF16 or AMX" if native else "this CPU has neither AVX512-BF16 nor AMX-BF16"
    return features["amx_fp16"], "AMX-FP16" if features["amx_fp16"] else "this CPU has no AMX-FP16"


@functools.cache
def _arm_has(on_linux: str, on_macos: str) -> bool:
    """Whether this ARM CPU has a feature, by the name that Linux or macOS gives it."""
    if sys.platform == "darwin":
        command = ["sysctl", "-n", f"hw.optional.arm.{on_macos}"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() == "1"
    with contextlib.suppress(OSError):
        return on_linux in Path("/proc/cpuinfo").read_text().split()
    return False


def fast_products(device: torch.device) -> torch.autocast:
    """A context in which products run in bfloat16 where that is faster than float32; sums, norms and softmax do not."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=has_half_arithmetic(device, torch.bfloat16)[0])


def power_source() -> str | None:
    """`battery`, `mains`, or None where the machine does not say."""
    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    if battery is None:
        return None
    return "mains" if battery.power_plugged else "battery"


def default_threads() -> int:
    """Physical cores this process may use: hyper-threads share the units that products run on."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share, _, period = _of_container("cpu.max").partition(" ")  # of a container: microseconds in each period
    if share.isdigit():
        allowed = min(allowed, round(int(share) / int(period)))
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


class Unsupported(RuntimeError):
    """A technique that this device, CPU or build of torch cannot run; its message is the record's reason."""
