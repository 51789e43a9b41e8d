"""The forms of int4 layers on disk: codes two to a byte, scale and minimum as they are."""

from __future__ import annotations

from kernels.calibration_cache import CalibrationCache
from kernels.gptq import Form
from kernels.int4 import pack_nibbles, unpack_nibbles


def save_forms(cache: CalibrationCache, name: str, forms: dict[str, Form], norms: dict | None = None) -> None:
    """Codes go to disk packed; `norms` are weights of norms by name."""
    tensors = dict(norms or {})
    for layer, (codes, scale, minimum) in forms.items():
        tensors |= {f"{layer}.codes": pack_nibbles(codes), f"{layer}.scale": scale, f"{layer}.minimum": minimum}
    cache.save_tensors(name, tensors)


def cached_forms(cache: CalibrationCache, name: str, model) -> tuple[dict | None, dict]:
    """What `save_forms` stored, on the model's device; (None, {}) where there is nothing."""
    tensors = cache.tensors(name, model.device)
    if tensors is None:
        return None, {}
    layers = [key.removesuffix(".codes") for key in tensors if key.endswith(".codes")]
    forms = {
        layer: (
            unpack_nibbles(tensors[f"{layer}.codes"], model.get_submodule(layer).in_features),
            tensors[f"{layer}.scale"],
            tensors[f"{layer}.minimum"],
        )
        for layer in layers
    }
    # Copied: one tensor that stays with the model would keep the whole file mapped, 70 MB of it resident.
    return forms, {key: tensor.clone() for key, tensor in tensors.items() if key.endswith("norm.weight")}
