"""Weights that have not left their file yet: read when they are needed, a block of rows at a time, and never all at once.

`models.load_model(..., read=False)` gives a model whose matrices are `UnreadWeight`s. A technique marked `@streams` takes such
a model, converts each matrix block by block and drops it, so that a load needs little more memory than what it leaves;
on its return nothing is unread. Every other technique must see a model in memory. Whoever loads asks one question,
`takes_unread(apply)` of the first technique, and `read_weights` is what a technique calls that needs the floats after all.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

BLOCK_WEIGHTS = (
    1 << 17
)  # half a MB in float32: what rounding makes of a block on the way stays in the cache, and is soon reused
PANEL_ROWS = 16  # a multiple of what kernels/packing.py lays side by side, so that blocks can be packed one by one

# name -> shape and `read(first, last)`, which gives rows first to last - 1 as float32 on the CPU; first begins a block
StoredWeights = dict[str, tuple[tuple[int, ...], Callable[[int, int], torch.Tensor]]]


class UnreadWeight(nn.Parameter):
    """Stands for a matrix [N, K] that is still in its file. Shape and device are right, the dtype is float32, and every
    value is NaN (one number, repeated): who uses it unread cannot fail to notice."""

    def __new__(cls, shape: tuple[int, int], read: Callable[[int, int], torch.Tensor], device: torch.device | str = "cpu"):
        weight = super().__new__(cls, torch.full((1, 1), torch.nan, device=device).expand(shape), requires_grad=False)
        weight.read = read
        return weight


def streams(apply: Callable) -> Callable:
    """Marks a technique's `apply`: it takes a model with unread weights, and leaves none."""
    apply.streams = True
    return apply


def takes_unread(apply: Callable) -> bool:
    """Whether `apply` was marked with `streams`."""
    return getattr(apply, "streams", False)


def block_rows(columns: int) -> int:
    """How many rows of a matrix with so many columns make a block."""
    return max(PANEL_ROWS, BLOCK_WEIGHTS // columns // PANEL_ROWS * PANEL_ROWS)


def rows_of(weight: torch.Tensor, rows: slice) -> torch.Tensor:
    """These rows of a weight [N, K], read now if it is unread; float32 if so, else in its own dtype. On its device."""
    return weight.read(rows.start, rows.stop).to(weight.device) if isinstance(weight, UnreadWeight) else weight.data[rows]


def by_rows(shape: tuple[int, int], convert: Callable[[slice], tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    """What `convert(rows)` makes of one block of rows after another, laid end to end.

    The first dimension of each tensor that `convert` returns must be the block's rows, or its panels of 16 rows.
    """
    n, step = shape[0], block_rows(shape[1])
    whole, lengths = [], []
    for first in range(0, n, step):
        parts = convert(slice(first, min(first + step, n)))
        if n <= step:
            return parts
        if not whole:
            lengths = [len(part) for part in parts]
            whole = [part.new_empty(-(-n * len(part) // step), *part.shape[1:]) for part in parts]
        for joined, part, length in zip(whole, parts, lengths, strict=True):
            start = first * length // step
            joined[start : start + len(part)] = part
    return tuple(whole)


def read_weights(module: nn.Module) -> None:
    """Reads whatever is unread in `module`, in place; two modules within it that share a weight go on sharing it."""
    known: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, weight in list(part.named_parameters(recurse=False)):
            if isinstance(weight, UnreadWeight):
                if id(weight) not in known:
                    (values,) = by_rows(weight.shape, lambda rows, weight=weight: (rows_of(weight, rows),))
                    known[id(weight)] = nn.Parameter(values, requires_grad=False)
                setattr(part, name, known[id(weight)])
