"""GPTQ: round weights one input after another, each error made good by the inputs that are still to come.

Rounding W to W' changes a layer's output by (W - W') x, on average trace((W - W') H (W - W')^T) with the second moments
H = E[x x^T] of its inputs. Rounding to nearest minimises that only where H is diagonal. With input j rounded, error e,
the best the other inputs can do is to move by -e * Hinv[j, :] / Hinv[j, j] (Frantar et al. 2022, eq. 2 and 3:
https://arxiv.org/abs/2210.17323). The Cholesky factor of Hinv holds those rows for all j, each with the inputs before it gone.
"""

from __future__ import annotations

import torch

from kernels.int4 import quantize_int4, round_to_levels

BLOCK = 64  # columns whose errors are spread one by one; the columns after them learn of them in one product


def gptq(
    weight: torch.Tensor,
    moments: torch.Tensor,
    *,
    group_size: int,
    damping: float = 0.01,
    act_order: bool = False,
    grid: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rounds to int4 so that the layer's output changes little on inputs with the given second moments.

    Args:
        weight: floating point [N, K]. float64 is computed in float64, all else in float32.
        moments: float32 [K, K], mean of x x^T. Inputs that are always 0 are rounded to nearest.
        group_size: consecutive inputs per scale.
        damping: share of the mean diagonal that is added to the diagonal.
        act_order: visit inputs by falling second moment. The groups stay runs of consecutive inputs, so their grids are
            fixed beforehand from the weights as they came (static groups).
        grid: scale and minimum, bfloat16 [N, G], to round to instead of ones found here.

    Returns:
        codes uint8 [N, K], scale and minimum bfloat16 [N, G], as from quantize_int4.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    work, (n, k) = weight.detach().to(dtype).clone(), weight.shape
    damped = damp(moments.to(dtype), damping)
    order = damped.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(k, device=work.device)
    scale, minimum = grid or quantize_int4(work, group_size)[1:]
    fixed = act_order or grid is not None
    scale, minimum = scale.clone(), minimum.clone()
    upper = _factor_of_inverse(damped[order][:, order])
    work = work[:, order]
    codes = torch.empty(n, k, dtype=torch.uint8, device=work.device)
    for first in range(0, k, BLOCK):
        last = min(first + BLOCK, k)
        errors = torch.zeros(n, last - first, dtype=dtype, device=work.device)
        for j in range(first, last):
            if not fixed and j % group_size == 0:
                # A group may reach past this block: its later columns must have heard of all errors before them.
                ahead = _with_pending(work, errors, upper, first, last, j, min(j + group_size, k))
                grid_here = quantize_int4(ahead, group_size)
                scale[:, j // group_size], minimum[:, j // group_size] = grid_here[1][:, 0], grid_here[2][:, 0]
            group = order[j] // group_size
            s, m = scale[:, group], minimum[:, group]
            level = round_to_levels(work[:, j, None], s, m)[:, 0]
            codes[:, order[j]] = level.to(torch.uint8)
            error = (work[:, j] - (level * s.to(dtype) + m.to(dtype))) / upper[j, j]
            errors[:, j - first] = error
            work[:, j:last] -= error[:, None] * upper[j, j:last]
        work[:, last:] -= errors @ upper[first:last, last:]
    return codes, scale, minimum


def gptq_reference(
    weight: torch.Tensor, moments: torch.Tensor, *, group_size: int, damping: float = 0.01, act_order: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The slow twin of gptq: the update of the paper word for word, the inverse itself shrunk after every input (eq. 3)."""
    work, k = weight.detach().double().clone(), weight.shape[1]
    damped = damp(moments.double(), damping)
    inverse = torch.linalg.inv(damped)
    codes, scale, minimum = quantize_int4(work, group_size)
    order = damped.diagonal().argsort(descending=True, stable=True).tolist() if act_order else range(k)
    for j in order:
        group = j // group_size
        if not act_order and j % group_size == 0:
            _, s, m = quantize_int4(work[:, j : j + group_size], group_size)
            scale[:, group], minimum[:, group] = s[:, 0], m[:, 0]
        level = round_to_levels(work[:, j, None], scale[:, group], minimum[:, group])[:, 0]
        codes[:, j] = level.to(torch.uint8)
        error = work[:, j] - (level * scale[:, group].double() + minimum[:, group].double())
        work -= torch.outer(error / inverse[j, j], inverse[j])
        work[:, j] = 0  # never looked at again
        inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, j] = 1  # its row and column are zero now; the value is not used again
    return codes, scale, minimum


def damp(moments: torch.Tensor, damping: float) -> torch.Tensor:
    """moments with `damping` times their mean diagonal on the diagonal, and 1 where an input never occurs: [K, K]."""
    diagonal = moments.diagonal()
    added = damping * diagonal.mean() + (diagonal == 0).to(moments.dtype)
    return moments + torch.diag(added)


def _factor_of_inverse(damped: torch.Tensor) -> torch.Tensor:
    """Upper triangular U with inv(damped) = U^T U. In float64: moments of real activations are close to singular."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped.double()))
    return torch.linalg.cholesky(inverse, upper=True).to(damped.dtype)


def _with_pending(work, errors, upper, first: int, last: int, start: int, stop: int) -> torch.Tensor:
    """Columns start..stop as they are after all errors so far, those of this block included."""
    ahead = work[:, start:stop].clone()
    if stop > last:
        ahead[:, last - start :] -= errors[:, : start - first] @ upper[first:start, last:stop]
    return ahead
