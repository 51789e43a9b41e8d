"""Replacing the linear layers of a model one at a time, so that only one of them is ever held twice; and cutting one down."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from devices import release_memory, trim_heap


def add_notes(model, *notes: str) -> None:
    """Sentences on what was done to `model`, for its record."""
    model.notes = [*getattr(model, "notes", []), *notes]


def check_not_lean(model) -> None:
    """Raises ValueError after lean_decode, which holds products of its own: what is changed later would not reach them."""
    if hasattr(model.forward, "original"):
        raise ValueError("this model has the lean forward pass already: apply lean_decode last")


def replace_linears(model, make: Callable[[str, nn.Linear], nn.Module]) -> None:
    """Put `make(name, linear)` where each plain nn.Linear stands."""
    # Names, not modules: a list of modules would keep every replaced weight alive until the end.
    for name in [name for name, module in model.named_modules() if type(module) is nn.Linear]:
        model.set_submodule(name, make(name, model.get_submodule(name)))
        trim_heap()  # else what the next layer leaves lies behind what this one freed, and both count
    release_memory(model.device)


def is_tied(model) -> bool:
    """Whether the input embedding and lm_head are one tensor, as in SmolLM2."""
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


class SharedTable(nn.Module):
    """The embedding table of a tied model: looks up float32 rows in the weight of lm_head, anything with `rows(ids)`."""

    logical_parameters = 0  # lm_head's

    def __init__(self, lm_head: nn.Module):
        super().__init__()
        self.shared = lm_head

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.shared.rows(ids)


def cut_linear(linear: nn.Linear, *, rows: torch.Tensor | None = None, columns: torch.Tensor | None = None) -> nn.Linear:
    """A plain nn.Linear with only these outputs (`rows`) or inputs (`columns`), int64 indices; its own contiguous memory."""
    weight = linear.weight.data if rows is None else linear.weight.data[rows]
    weight = weight if columns is None else weight[:, columns]
    bias = linear.bias if linear.bias is None or rows is None else nn.Parameter(linear.bias.data[rows])
    smaller = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    smaller.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    smaller.bias = bias
    return smaller
