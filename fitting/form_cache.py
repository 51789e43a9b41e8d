"""The forms of int4 layers on disk: codes two to a byte, scale and minimum as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from safetensors import SafetensorError, safe_open

from fitting.calibration_cache import CalibrationCache
from kernels.int4 import Form, pack_nibbles, unpack_nibbles


class StoredForms(Mapping):
    """Forms by layer name, each read when it is asked for: unpacked, all codes together take twice what the model will.

    `norms` are the weights of norms by name, in memory. The file is mapped anew for every read, and let go: pages of a mapped
    file count as memory from the first touch on.
    """

    def __init__(self, path, model):
        """Raises OSError or SafetensorError if there is no such file, or only a part of one."""
        self._path, self._device = path, model.device
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
        layers = [name.removesuffix(".codes") for name in names if name.endswith(".codes")]
        self._inputs = {layer: model.get_submodule(layer).in_features for layer in layers}
        norms = [name for name in names if name.endswith("norm.weight")]
        self.norms = dict(zip(norms, self._read(*norms), strict=True))

    def __getitem__(self, layer: str) -> Form:
        return self.rows(layer, slice(None))

    def rows(self, layer: str, rows: slice) -> Form:
        inputs = self._inputs[layer]
        codes, scale, minimum = self._read(*(f"{layer}.{part}" for part in ("codes", "scale", "minimum")), rows=rows)
        return unpack_nibbles(codes, inputs), scale, minimum

    def __contains__(self, layer: object) -> bool:  # Mapping's own would read the form to find out
        return layer in self._inputs

    def __iter__(self) -> Iterator[str]:
        return iter(self._inputs)

    def __len__(self) -> int:
        return len(self._inputs)

    def _read(self, *names: str, rows: slice = slice(None)) -> list[torch.Tensor]:
        with safe_open(self._path, framework="pt") as file:
            return [file.get_slice(name)[rows].to(self._device, copy=True) for name in names]


def rows_of_form(forms: Mapping[str, Form], layer: str, rows: slice) -> Form:
    """Codes [n, K], scale and minimum [n, G] of some rows of a layer; of stored forms no more than these is read."""
    return forms.rows(layer, rows) if isinstance(forms, StoredForms) else tuple(part[rows] for part in forms[layer])


def save_forms(cache: CalibrationCache, name: str, forms: Mapping[str, Form], norms: dict | None = None) -> None:
    """Codes go to disk packed; `norms` are weights of norms by name."""
    tensors = dict(norms or {})
    for layer, (codes, scale, minimum) in forms.items():
        tensors |= {f"{layer}.codes": pack_nibbles(codes), f"{layer}.scale": scale, f"{layer}.minimum": minimum}
    cache.save_tensors(name, tensors)


def cached_forms(cache: CalibrationCache, name: str, model) -> StoredForms | None:
    """What `save_forms` stored, or None where there is nothing."""
    try:
        return StoredForms(cache.folder / f"{name}.safetensors", model)
    except (OSError, SafetensorError):
        return None
