"""Rounded weights on disk: minutes of GPTQ are spent once per model, text and options. safetensors only, never pickle."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kernels.int4 import pack_nibbles, unpack_nibbles

VERSION = 3  # to be raised when gptq.py, blockwise.py, tuning.py or the rounding in int4.py find other codes or scales


def cache_folder() -> Path:
    """Where rounded weights are kept; deleting it costs nothing but time."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "tinyllama-optimization"


def cache_key(model, ids: torch.Tensor, **options) -> str:
    """Names a result by everything it depends on: the weights themselves (whatever was done to them before), the
    calibration ids, the options and the version of the method."""
    digest = hashlib.sha256(repr((VERSION, sorted(options.items()))).encode())
    digest.update(ids.cpu().contiguous().numpy().tobytes())
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:24]


def load_forms(key: str, shapes: dict[str, tuple[int, int]], device: torch.device) -> tuple[dict, dict] | None:
    """Forms by layer name and weights of norms by parameter name, on `device`; None where there are none for `shapes`
    (name -> N, K) or the file cannot be read."""
    try:
        tensors = load_file(cache_folder() / f"int4-{key}.safetensors", device=str(device))
        forms = {
            name: (unpack_nibbles(tensors[f"{name}.codes"], k), tensors[f"{name}.scale"], tensors[f"{name}.minimum"])
            for name, (_, k) in shapes.items()
        }
        return forms, {name: tensor for name, tensor in tensors.items() if name.endswith("norm.weight")}
    except (OSError, SafetensorError, KeyError):
        return None


def load_costs(key: str) -> dict[str, float] | None:
    """Costs by layer name as save_costs wrote them, or None."""
    try:
        return json.loads((cache_folder() / f"costs-{key}.json").read_text())
    except (OSError, ValueError):
        return None


def save_costs(key: str, costs: dict[str, float]) -> None:
    """Like save_forms, for what sensitivity.loss_increases has measured."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as scratch:
            (Path(scratch) / "costs").write_text(json.dumps(costs))
            (Path(scratch) / "costs").replace(folder / f"costs-{key}.json")
    except OSError:
        return


def save_forms(key: str, forms: dict, norms: dict | None = None) -> None:
    """Written beside its final name and renamed: a killed run leaves no half file. A full disk is no reason to stop."""
    tensors = {name: weight.cpu() for name, weight in (norms or {}).items()}
    for name, (codes, scale, minimum) in forms.items():
        tensors |= {f"{name}.codes": pack_nibbles(codes).cpu(), f"{name}.scale": scale.cpu(), f"{name}.minimum": minimum.cpu()}
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as scratch:
            save_file(tensors, Path(scratch) / "forms")
            (Path(scratch) / "forms").replace(folder / f"int4-{key}.safetensors")
    except OSError:
        return
