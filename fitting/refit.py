"""Closed forms for removing inputs of a linear layer: which go, what that costs, and the weights that remain.

A layer computes y = W x, W [N, K]. Everything here needs only moments over calibration tokens: C = mean x x^T [K, K], how
inputs go together, and optionally G = mean g g^T [N, N], where g is the gradient of the log-likelihood of a token drawn from
the model's own distribution at y. With G an error of the output is weighed by how much the model's answer feels it:
half of E[(g . dy)^2] is the KL divergence in nats to second order (the Fisher information), taken here as
tr(G dW C dW^T) / 2, as if inputs and gradients were independent (K-FAC).

Removing inputs R and refitting the others by least squares costs tr(G W_R ((C^-1)_RR)^-1 W_R^T) / 2, and the refitted weights
are W - W_R ((C^-1)_RR)^-1 (C^-1)_R: (optimal brain surgeon, Hassibi and Stork 1993; on whole structures: ZipLM, Kurtic et
al. 2023, https://arxiv.org/abs/2302.04089). G changes what goes, never the refit.
"""

from __future__ import annotations

import torch

DAMPINGS = (1.0, 0.1, 0.03, 0.01, 1e-3)  # tried in this order, until the held-out error rises
SELECTION_DAMPING = 1e-2  # a share of C's mean diagonal: keeps C^-1 from trusting directions that text hardly visits


def damped(second_moment: torch.Tensor, damping: float) -> torch.Tensor:
    """C + damping * mean(diag C) * I, float64 [K, K]."""
    c = second_moment.double()
    # A layer whose inputs are all zero still needs an invertible matrix; any positive number gives the same answer.
    ridge = damping * c.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    return c + ridge * torch.eye(len(c), dtype=c.dtype, device=c.device)


def eliminate(
    weight: torch.Tensor, second_moment: torch.Tensor, gradient_moment: torch.Tensor | None = None, *,
    group: int, at_once: int = 1, steps: int,
) -> tuple[list[list[int]], list[float]]:  # fmt: skip
    """Greedy backward elimination of input groups of `group` neighbouring columns, `at_once` groups a step.

    weight [N, K], second_moment [K, K], gradient_moment [N, N] (None: identity, the plain squared error).
    Returns for each of `steps` steps the groups that went, and the total cost after it: nats with G, else squared error.
    After each step all remaining columns count as refitted, so a head that can be rebuilt from others is cheap.
    """
    w, groups = weight.detach().double().clone(), weight.shape[1] // group
    inverse = torch.linalg.inv(damped(second_moment, SELECTION_DAMPING))
    g = None if gradient_moment is None else gradient_moment.double()
    felt = w if g is None else g @ w  # kept up with w below: G W anew at every step would cost more than all the rest
    alive = torch.ones(groups, dtype=torch.bool, device=w.device)
    order, costs, total = [], [], 0.0
    for _ in range(steps):
        scores = _removal_costs(w, felt, inverse, group).masked_fill(~alive, torch.inf)
        chosen = scores.argsort()[:at_once]
        columns = (chosen[:, None] * group + torch.arange(group, device=w.device)).flatten()
        block = torch.linalg.inv(inverse[columns][:, columns])
        gone = w[:, columns]
        total += float(((gone @ block) * felt[:, columns]).sum()) / 2
        made_up = block @ inverse[columns]
        if g is not None:
            felt.addmm_(felt[:, columns], made_up, alpha=-1)
        w.addmm_(gone, made_up, alpha=-1)
        inverse.addmm_(inverse[:, columns], made_up, alpha=-1)
        w[:, columns] = felt[:, columns] = 0  # exactly, so that rounding cannot bring a removed column back
        inverse[:, columns] = inverse[columns] = 0
        alive[chosen] = False
        order.append(chosen.tolist())
        costs.append(total)
    return order, costs


def _removal_costs(w: torch.Tensor, felt: torch.Tensor, inverse: torch.Tensor, group: int) -> torch.Tensor:
    """Cost of each group alone, [groups]; of groups already gone, anything (the caller masks them)."""
    if group == 1:
        return (felt * w).sum(0) / inverse.diagonal().clamp_min(1e-300)
    count = w.shape[1] // group
    blocks = torch.stack([inverse[i * group : (i + 1) * group, i * group : (i + 1) * group] for i in range(count)])
    empty = blocks.diagonal(dim1=1, dim2=2).sum(1) == 0
    blocks[empty] = torch.eye(group, dtype=blocks.dtype, device=blocks.device)
    by_group = w.T.reshape(count, group, -1)
    squares = felt.T.reshape(count, group, -1) @ by_group.transpose(1, 2)
    return (squares * torch.linalg.inv(blocks)).sum(dim=(1, 2))


class Regression:
    """Moments of a regression of y [N] on x [K], summed over batches: everything a ridge fit and its error need."""

    def __init__(self):
        self.xx, self.yx, self.yy, self.tokens = 0.0, 0.0, 0.0, 0

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """x float32 [T, K], y float32 [T, N]."""
        self.xx = self.xx + (x.T @ x).double()
        self.yx = self.yx + (y.T @ x).double()
        self.yy += float(y.double().square().sum())
        self.tokens += len(x)

    def error(self, weight: torch.Tensor) -> float:
        """Mean squared error per token of y ~ W x, summed over outputs."""
        w = weight.double()
        return (self.yy - 2 * float((w * self.yx).sum()) + float((w @ self.xx * w).sum())) / self.tokens


def ridge(moments: Regression, start: torch.Tensor, damping: float) -> torch.Tensor:
    """The weights [N, K] that minimise the squared error plus damping * mean(diag xx) * |W - start|^2, in float64."""
    w = start.double()
    return w + torch.linalg.solve(damped(moments.xx, damping), (moments.yx - w @ moments.xx).T).T


def fit_ridge(train: Regression, held_out: Regression, start: torch.Tensor) -> torch.Tensor:
    """`ridge` with the damping that does best on `held_out` tokens; `start` itself where nothing beats it. In its dtype."""
    best, least = start.double(), held_out.error(start)
    for damping in DAMPINGS:
        candidate = ridge(train, start, damping)
        error = held_out.error(candidate)
        if error >= least:
            break  # the held-out error has one valley: less damping only follows the training tokens further
        best, least = candidate, error
    return best.to(start.dtype)
