"""Llama models from safetensors: a folder or a Hub snapshot, in one file or in shards, each tensor read when it is asked for.

The file is mapped anew for every read, and let go: pages of a mapped file count as memory from the first touch on.
"""

from __future__ import annotations

import functools

import torch
from safetensors import safe_open
from transformers import GenerationConfig
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from streaming import StoredWeights

FLOATS = ("F64", "F32", "F16", "BF16")
NAMES = ("model.safetensors", "model.safetensors.index.json")
RECOMPUTED = "rotary_emb.inv_freq"  # which old files hold


def stored_weights(location: str, *, revision: str | None, tied: bool) -> StoredWeights:
    """Every tensor of the model in the folder or Hub repository `location`; a tied lm_head is left out.

    Raises OSError where there are no such files, SafetensorError for a damaged one, ValueError for numbers that are not
    floating point (a file that was quantised).
    """
    weights: StoredWeights = {}
    for path in files(location, revision):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (the handle is no dict)
                if name.endswith(RECOMPUTED) or (tied and name == "lm_head.weight"):
                    continue
                stored = file.get_slice(name)
                if stored.get_dtype() not in FLOATS:
                    raise ValueError(f"tensor {name} holds {stored.get_dtype()}, not one of {', '.join(FLOATS)}")
                weights[name] = tuple(stored.get_shape()), functools.partial(_read_rows, path, name)
    return weights


def generation_config(location: str, *, revision: str | None) -> GenerationConfig | None:
    """What the model's authors say of generating (its end-of-sequence tokens), or None where they say nothing."""
    try:
        return GenerationConfig.from_pretrained(location, revision=revision)
    except OSError:
        return None


def files(location: str, revision: str | None) -> list[str]:
    """Paths of the weights of a folder or Hub repository, downloaded if need be. Raises OSError where there are none."""
    for name in NAMES:
        path = cached_file(location, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        if path is not None:
            return [path] if name == NAMES[0] else get_checkpoint_shard_files(location, path, revision=revision)[0]
    raise OSError(f"no {NAMES[0]} and no {NAMES[1]}: only safetensors are read")


def _read_rows(path: str, name: str, first: int, last: int) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_slice(name)[first:last].to(torch.float32, copy=True)
