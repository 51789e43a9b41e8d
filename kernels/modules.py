"""Replacing the linear layers of a model one at a time, so that only one of them is ever held twice."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from devices import release_memory


def replace_linears(model, make: Callable[[str, nn.Linear], nn.Module]) -> int:
    """Put `make(name, linear)` where each plain nn.Linear stands; returns how many were replaced."""
    # Names, not modules: a list of modules would keep every replaced weight alive until the end.
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    for name in names:
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, make(name, model.get_submodule(name)))
    release_memory(model.device)
    return len(names)


def is_tied(model) -> bool:
    """Whether the input embedding and lm_head are one tensor, as in SmolLM2."""
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight
