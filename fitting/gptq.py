"""GPTQ: round weights one input after another, each error made good by the inputs that are still to come.

Rounding W to W' changes a layer's output by (W - W') x: on average trace((W - W') H (W - W')^T) with the second moments
H = E[x x^T] of its inputs. Rounding to nearest minimises that only where H is diagonal. With input j rounded, error e,
the best the other inputs can do is to move by -e * Hinv[j, :] / Hinv[j, j] (Frantar et al. 2022, eq. 2 and 3:
https://arxiv.org/abs/2210.17323). The Cholesky factor of Hinv holds those rows for all j, each with the inputs before it gone.

What one pass leaves is then improved from two sides. `refit_grid` keeps the codes and finds the scales and minimums that
suit them best, a least-squares problem of 2 G unknowns per output; `descend` keeps the grid and moves one code at a time
to where the error is least, all others standing still (Behdin et al. 2023, QuantEase: https://arxiv.org/abs/2309.01885).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.int4 import LEVELS, Form, dequantize_int4, quantize_int4, round_to_levels

RIDGE = 1e-4  # of a diagonal element: holds the least-squares grid to the old one where the codes leave it open
EQUATION_BYTES = 1 << 27  # of the equations of so many outputs at a time: a large lm_head would take gigabytes at once


def gptq(
    weight: torch.Tensor,
    moments: torch.Tensor,
    *,
    group_size: int,
    damping: float = 0.01,
    grid: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Form:
    """Rounds to int4 so that the layer's output changes little on inputs with the given second moments.

    Inputs are visited by falling second moment (act-order). The groups stay runs of consecutive inputs, so their grids are
    fixed beforehand from the weights as they came (static groups).

    Args:
        weight: floating point [N, K]. float64 is computed in float64, all else in float32.
        moments: float32 [K, K], mean of x x^T. Inputs that are always 0 are rounded to nearest.
        group_size: consecutive inputs per scale.
        damping: share of the mean diagonal that is added to the diagonal.
        grid: scale and minimum, bfloat16 [N, G], to round to instead of ones found here.

    Returns:
        codes uint8 [N, K], scale and minimum bfloat16 [N, G], as from quantize_int4.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    k, device = weight.shape[1], weight.device
    damped = damp(moments.to(dtype), damping)
    order = damped.diagonal().argsort(descending=True, stable=True)
    scale, minimum = grid or quantize_int4(weight, group_size)[1:]
    upper = _factor_of_inverse(damped[order][:, order])
    # One row per input: what is updated at every step is then contiguous.
    work = weight.detach().to(dtype)[:, order].T.contiguous()
    codes = torch.empty(work.shape, dtype=torch.uint8, device=device)
    # Within a block errors are spread one by one; the inputs after it learn of them in one product.
    for first in range(0, k, group_size):
        last = min(first + group_size, k)
        groups = order[first:last] // group_size
        scales, minimums = scale.to(dtype).T[groups], minimum.to(dtype).T[groups]
        errors = torch.empty(last - first, work.shape[1], dtype=dtype, device=device)
        for j in range(first, last):
            s, m = scales[j - first], minimums[j - first]
            level = torch.where(s > 0, ((work[j] - m) / s).round_().clamp_(0, LEVELS), 0)
            codes[order[j]] = level.to(torch.uint8)
            errors[j - first] = (work[j] - level * s - m) / upper[j, j]
            work[j:last].addr_(upper[j, j:last], errors[j - first], alpha=-1)
        work[last:].addmm_(upper[first:last, last:].T, errors, alpha=-1)
    return codes.T.contiguous(), scale, minimum


def gptq_reference(weight: torch.Tensor, moments: torch.Tensor, *, group_size: int, damping: float = 0.01) -> Form:
    """The slow twin of gptq: the update of the paper word for word, the inverse itself shrunk after every input (eq. 3)."""
    work = weight.detach().double().clone()
    damped = damp(moments.double(), damping)
    inverse = torch.linalg.inv(damped)
    codes, scale, minimum = quantize_int4(work, group_size)
    for j in damped.diagonal().argsort(descending=True, stable=True).tolist():
        group = j // group_size
        level = round_to_levels(work[:, j, None], scale[:, group], minimum[:, group])[:, 0]
        codes[:, j] = level.to(torch.uint8)
        error = work[:, j] - (level * scale[:, group].double() + minimum[:, group].double())
        work -= torch.outer(error / inverse[j, j], inverse[j])
        inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, j] = 1  # its row and column are zero now; the value is not used again
    return codes, scale, minimum


def gptq_refined(weight: torch.Tensor, moments: torch.Tensor, *, group_size: int, damping: float = 0.01) -> Form:
    """gptq, then grid and codes improved in turn. Arguments and result as in gptq."""
    damped = damp(moments.float(), damping)
    options = {"group_size": group_size, "damping": damping}
    codes, scale, minimum = gptq(weight, moments, **options)
    grid = refit_grid(weight, damped, codes, scale, minimum, group_size)
    codes, scale, minimum = gptq(weight, moments, grid=grid, **options)
    codes = descend(weight, damped, codes, scale, minimum, group_size, sweeps=2)
    scale, minimum = refit_grid(weight, damped, codes, scale, minimum, group_size)
    return descend(weight, damped, codes, scale, minimum, group_size), scale, minimum


def descend(
    weight: torch.Tensor, moments: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor,
    group_size: int, *, sweeps: int = 1,
) -> torch.Tensor:  # fmt: skip
    """Codes, uint8 [N, K], after each was moved in turn to where the output error is least. Never raises that error."""
    k = weight.shape[1]
    per_input = torch.arange(k, device=weight.device) // group_size
    steps, lows = scale.float().T[per_input], minimum.float().T[per_input]
    codes = codes.T.clone()
    weight = weight.detach().float().T
    left = weight - (codes * steps + lows)  # what the other inputs would have to make good, one row per input
    for _ in range(sweeps):
        for first in range(0, k, group_size):
            last = min(first + group_size, k)
            pull = moments[first:last] @ left
            for j in range(first, last):
                target = weight[j] - left[j] + pull[j - first] / moments[j, j]
                level = torch.where(steps[j] > 0, ((target - lows[j]) / steps[j]).round_().clamp_(0, LEVELS), 0)
                codes[j] = level.to(torch.uint8)
                change = weight[j] - level * steps[j] - lows[j] - left[j]
                left[j] += change
                pull.addr_(moments[first:last, j], change)
    return codes.T.contiguous()


def refit_grid(
    weight: torch.Tensor, moments: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor,
    group_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Scale and minimum, bfloat16 [N, G], of least output error for the given codes.

    For each output, W' is linear in its 2 G unknowns: W' = B u with B = [codes of group g | ones of group g], so that
    (B^T H B) u = B^T H w. A group whose scale would turn negative keeps a scale of 0.
    """
    rows = max(1, EQUATION_BYTES // (8 * (2 * scale.shape[1]) ** 2))
    parts = zip(*(part.split(rows) for part in (weight.detach(), codes, scale, minimum)), strict=True)
    refitted = [_refit_rows(*part, moments, group_size) for part in parts]
    return tuple(torch.cat(part) for part in zip(*refitted, strict=True))


def _refit_rows(weight, codes, scale, minimum, moments: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    (n, k), groups = weight.shape, scale.shape[1]
    missing = groups * group_size - k
    levels = F.pad(codes.float(), (0, missing))
    ones = F.pad(torch.ones(k, device=weight.device), (0, missing))
    moments = F.pad(moments.float(), (0, missing, 0, missing))

    def per_group(values: torch.Tensor) -> torch.Tensor:
        return values.unflatten(-1, (groups, group_size)).sum(-1)

    normal = torch.empty(n, 2 * groups, 2 * groups, device=weight.device)
    for group in range(groups):
        inputs = slice(group * group_size, (group + 1) * group_size)
        by_codes = levels[:, inputs] @ moments[inputs]
        normal[:, group, :groups] = per_group(by_codes * levels)
        normal[:, group, groups:] = normal[:, groups:, group] = per_group(by_codes * ones)
        normal[:, groups + group, groups:] = per_group(ones[inputs] @ moments[inputs] * ones)
    left = F.pad(weight.float() - dequantize_int4(codes, scale, minimum, group_size), (0, missing)) @ moments
    right = torch.cat([per_group(left * levels), per_group(left * ones)], 1).double()
    normal = normal.double()
    diagonal = normal.diagonal(dim1=1, dim2=2)
    normal = normal + torch.diag_embed(RIDGE * diagonal + 1e-12 * diagonal.mean() + torch.finfo(torch.float64).tiny)
    unknowns = torch.cat([scale, minimum], 1).float() + torch.linalg.solve(normal, right).float()
    return unknowns[:, :groups].clamp_min(0).bfloat16(), unknowns[:, groups:].bfloat16()


def damp(moments: torch.Tensor, damping: float) -> torch.Tensor:
    """moments with `damping` times their mean diagonal on the diagonal, and 1 where an input never occurs: [K, K]."""
    diagonal = moments.diagonal()
    return moments + torch.diag(damping * diagonal.mean() + (diagonal == 0).to(moments.dtype))


def _factor_of_inverse(damped: torch.Tensor) -> torch.Tensor:
    """Upper triangular U with inv(damped) = U^T U. In float64: moments of real activations are close to singular."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped.double()))
    return torch.linalg.cholesky(inverse, upper=True).to(damped.dtype)
