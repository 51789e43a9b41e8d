"""What calibration found out about one model, kept on disk: costs as JSON, codes and refitted weights as safetensors.

A folder belongs to one state of the weights, one calibration text and one set of options, all in its name as a hash, and
to the code that computed it. Files appear whole or not at all, so that an interrupted run goes on where it ended.
Deleting any of it costs nothing but time.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from devices import CACHE
from streaming import UnreadWeight, block_rows

ROOT = CACHE / "calibration"
CODE = ("refit.py", "divergence.py", "pruning_costs.py", "compensation.py")  # a change of the maths is a change of the result
# What the weights do not tell of a model's answers.
ARCHITECTURE = ("rms_norm_eps", "rope_parameters", "hidden_act", "num_attention_heads", "num_key_value_heads", "head_dim")
# As it was when this process began: who edits a file meanwhile changes what the next one computes, not this one.
HERE = Path(__file__).parent
SOURCES = {file.name: file.read_bytes() for folder in (HERE, HERE.parent / "kernels") for file in folder.glob("*.py")}


class CalibrationCache:
    """JSON values and tensors under names, in `folder`; a file that cannot be read counts as absent.

    `saved` counts what this process wrote, in all caches: above 0, it calibrated something anew."""

    saved = 0

    def __init__(self, folder: Path):
        self.folder = folder

    @classmethod
    def of(cls, model, windows: torch.Tensor, *, code: tuple[str, ...] = CODE, **options) -> CalibrationCache:
        """The cache of these weights, whatever was done to them before, in this architecture, these calibration windows, the
        files `code` here or in kernels/, and these options (what JSON can hold)."""
        shape = {key: getattr(model.config, key, None) for key in ARCHITECTURE}
        digest = hashlib.sha256(json.dumps([options, shape], sort_keys=True, default=str).encode())
        digest.update(windows.cpu().numpy().tobytes())
        for name, parameter in model.named_parameters():
            digest.update(f"{name}{tuple(parameter.shape)}".encode())
            digest.update(_digest_of(parameter))
        for file in code:
            digest.update(SOURCES[file])
        return cls(ROOT.expanduser() / digest.hexdigest()[:24])

    @classmethod
    def named(cls, **what: str) -> CalibrationCache:
        """The cache of what depends on no weights: `what` says on what it does."""
        return cls(ROOT.expanduser() / hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:24])

    def json(self, name: str):
        """The value saved under `name`, or None."""
        try:
            return json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def save_json(self, name: str, value) -> None:
        self._write(f"{name}.json", lambda path: path.write_text(json.dumps(value), encoding="utf-8"))

    def tensors(self, name: str, device: torch.device | str = "cpu") -> dict[str, torch.Tensor] | None:
        """The tensors saved under `name`, or None."""
        try:
            return load_file(self.folder / f"{name}.safetensors", device=str(device))
        except (OSError, SafetensorError):
            return None

    def save_tensors(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        stored = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        self._write(f"{name}.safetensors", lambda path: save_file(stored, path))

    def _write(self, name: str, write) -> None:
        """Saving is a convenience: a full or read-only disk costs the next run its time, not this one its result."""
        part = self.folder / f"{name}.{os.getpid()}.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob("*.part"):  # by a process that was killed
                if (pid := left.stem.rpartition(".")[2]).isdigit() and not psutil.pid_exists(int(pid)):
                    left.unlink(missing_ok=True)
            write(part)
            part.replace(self.folder / name)
            CalibrationCache.saved += 1
        except (OSError, SafetensorError):
            part.unlink(missing_ok=True)


def _digest_of(parameter: torch.Tensor) -> bytes:
    """Of the values alone: the same whether they are in memory or in their file, from which they are read once for it."""
    if (known := getattr(parameter, "digest", None)) is not None:
        return known
    digest, blocks = hashlib.sha256(), [parameter]
    if unread := isinstance(parameter, UnreadWeight):
        rows, step = len(parameter), block_rows(parameter.shape[1])
        blocks = (parameter.read(first, min(first + step, rows)) for first in range(0, rows, step))
    for block in blocks:
        digest.update(block.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    if unread:
        parameter.digest = digest.digest()
    return digest.digest()


def show_progress(stage: str, done: int, total: int) -> None:
    """One line on stderr that is written over; a line per tenth where stderr is no terminal."""
    if sys.stderr.isatty():
        print(f"\rcalibrating: {stage} {done}/{total} ", end="\n" if done == total else "", file=sys.stderr, flush=True)
    elif done == total or done % max(1, total // 10) == 0:
        print(f"calibrating: {stage} {done}/{total}", file=sys.stderr, flush=True)
