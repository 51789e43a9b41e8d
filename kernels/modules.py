"""Replacing the linear layers of a model one at a time, so that only one of them is ever held twice."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def replace_linears(model: nn.Module, make: Callable[[str, nn.Linear], nn.Module]) -> int:
    """Put `make(name, linear)` where each plain nn.Linear stands; returns how many were replaced."""
    replaced = 0
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, make(name, module))
            replaced += 1
    return replaced


def is_tied(model) -> bool:
    """Whether the input embedding and lm_head are one tensor, as in SmolLM2."""
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight
