"""The record of one recipe and the file they are gathered in: which keys exist, where it ran, how it is written.

A quantity that was not measured is null, never 0 and never copied from the request.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import math
import os
import platform
import subprocess
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch
import transformers

from devices import MB, cpu_features, cpu_name, power_source

SCHEMA_VERSION = 1
# They read results and measure nothing: a change in them is no reason to measure again.
READERS_OF_RESULTS = (
    "readings.py", "report.py", "charts.py", "chart_parts.py", "axis_charts.py", "pruning_charts.py", "compare_runs.py",
)  # fmt: skip
TARGETS = {"decode_speedup": 1.6, "memory_change": -0.35, "perplexity_retention": 0.97}  # the original's promises

SCHEMA = json.loads((Path(__file__).parent / "record.schema.json").read_text(encoding="utf-8"))
RECORD_KEYS = tuple(SCHEMA["required"])  # every key, measured or not
QUALITY_KEYS = (
    "perplexity", "perplexity_retention", "perplexity_retention_ci", "kl_divergence", "top1_agreement", "delta_nll",
    "delta_nll_ci",
)  # fmt: skip


def new_record(**known) -> dict:
    """A record with every key of the contract, null unless given. Raises KeyError for a key the contract lacks."""
    unknown = set(known) - set(RECORD_KEYS)
    if unknown:
        raise KeyError(f"not keys of a record: {sorted(unknown)}")
    return {key: known.get(key) for key in RECORD_KEYS}


def busy_notice(environment: dict) -> str | None:
    """What to tell the user where something else is using this machine, or its GPU, already."""
    percent, in_use_mb = environment["cpu_percent_before"], environment["gpu_memory_in_use_mb"] or 0
    busy = [f"its CPU is {percent:.0f} % in use"] if percent > 15 else []
    busy += [f"{in_use_mb:.0f} MB of GPU memory are taken"] if in_use_mb > 1000 else []
    return f"the machine is busy before the run ({', '.join(busy)}): intervals will be wider" if busy else None


def _gpu_memory_in_use_mb(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return (total - free) / MB


def resolved(steps: list[tuple[str, dict]]) -> list[dict]:
    """The `steps` of a record: all options, those of the defaults of `apply` as well, so that it stands alone; as a file will
    hold them, so that they compare equal to what one does."""
    return as_saved([{"technique": technique, "options": defaults_of(technique) | options} for technique, options in steps])


def defaults_of(technique: str) -> dict:
    """What `apply` of a technique takes where nothing is said."""
    return technique_module(technique).apply.__kwdefaults__ or {}


def technique_module(technique: str):
    """The module with `apply`: a name in optimizations/, or the dotted path of a module of your own."""
    return importlib.import_module(technique if "." in technique else f"optimizations.{technique}")


def environment(*, device: torch.device, threads: int) -> dict:
    """Everything about the machine and the software that a reader needs before believing a figure."""
    return {
        **_commit(),
        "code_sha256": _code_sha256(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": cpu_name(),
        "cpu_features": [name for name, present in cpu_features().items() if present],
        "vector_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "threads": threads,
        "ram_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "os": platform.platform(),
        "load_average": [round(value, 2) for value in psutil.getloadavg()],
        "cpu_percent_before": psutil.cpu_percent(interval=0.5),
        "gpu_memory_in_use_mb": _gpu_memory_in_use_mb(device),
        "power_source": power_source(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@functools.cache
def _commit() -> dict:
    """The commit this code is at, and whether the tree differs from it; null outside a git checkout."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    commit = git("rev-parse", "HEAD")
    code_changed = git("status", "--porcelain", "--", ".", ":!results", ":!README.md")
    return {"commit": commit, "dirty": None if commit is None else bool(code_changed)}


@functools.cache
def _code_sha256() -> str:
    """One hash of all the code that measures: an edited kernel must not resume into the old one's results."""
    root = Path(__file__).parent
    files = sorted(file for part in ("*.py", "kernels/*", "fitting/*.py", "optimizations/*.py") for file in root.glob(part))
    digest = hashlib.sha256()
    for file in files:
        if file.is_file() and file.name not in READERS_OF_RESULTS:
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def save_json(path: Path, content: dict) -> None:
    """Write atomically; floats keep seven significant digits, what is not finite becomes null."""
    write_atomically(path, json.dumps(as_saved(content), indent=1, allow_nan=False) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """A temporary file beside the target, fsync, rename: a reader sees the old file or the new, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def as_saved(content):
    """As a file will hold it: floats rounded to seven significant digits (the rest is noise), NaN and infinity as null."""
    if isinstance(content, dict):
        return {key: as_saved(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [as_saved(value) for value in content]
    if isinstance(content, float):
        return float(f"{content:.7g}") if math.isfinite(content) else None
    return content


def file_size_mb(path: Path) -> float:
    """Bytes of a file, or of all files below a folder, in MB."""
    return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file()) / MB
