"""Masked least squares: the weights that stay make up for those that go.

For one linear, minimise tr((W' - W) G (W' - W)^T) over the weights W' that a mask lets stay, for all rows at once, by
conjugate gradient with products by G only. The mask is found on the way: rounds of growing sparsity, each of which
scores the weights that the round before solved for (iterative pruning with an exact second-order update; ours).

Shapes: O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from copal.config import PruneConfig
from copal.errors import NumericsError
from copal.masks import row_mask
from copal.sensitivity import Moment, scores

__all__ = ["damped", "masked_solve", "prune_group"]


def damped(second: Tensor, damping: float) -> Tensor:
    """G + damping * mean(diag G) * identity (I, I); the identity itself where no token reached the layer."""
    mean = second.diagonal().mean()
    return second + torch.eye(len(second), device=second.device) * torch.where(mean > 0, damping * mean, 1.0)


def masked_solve(
    target: Tensor, start: Tensor, mask: Tensor, second: Tensor, *, iterations: int, tolerance: float = 1e-4
) -> Tensor:
    """Minimise tr((W' - W) G (W' - W)^T) over W' that is zero outside `mask`: solve W' G = W G there.

    Preconditioned conjugate gradient (Hestenes and Stiefel 1952) on all rows together, each with its own step; the
    preconditioner is diag G.

    Args:
        target: W G (O, I), of the dense W.
        start: where W' starts (O, I).
        mask: true where a weight stays (O, I).
        second: G (I, I), symmetric positive definite: see `damped`.
        iterations: at most this many.
        tolerance: stop when the residual is this share of what it is for W' = 0.

    Returns:
        W' (O, I).
    """
    keep = mask.to(target.dtype)
    inverse_diagonal = second.diagonal().reciprocal()
    solution = start * keep
    residual = (target - solution @ second) * keep
    goal = tolerance**2 * (target * target * inverse_diagonal * keep).sum()
    direction = residual * inverse_diagonal
    power = (residual * direction).sum(1, keepdim=True)
    for _ in range(iterations):
        if power.sum() <= goal:
            break
        image = direction @ second * keep
        curvature = (direction * image).sum(1, keepdim=True)
        step = torch.where(curvature > 0, power / curvature, 0.0)
        solution = solution.addcmul_(step, direction)
        residual = residual.addcmul_(step, image, value=-1)
        conditioned = residual * inverse_diagonal
        new_power = (residual * conditioned).sum(1, keepdim=True)
        direction = conditioned.addcmul_(torch.where(power > 0, new_power / power, 0.0), direction)
        power = new_power
    return solution


def prune_group(weights: Mapping[str, Tensor], moment: Moment, config: PruneConfig) -> dict[str, Tensor]:
    """Prune the linears of a group to `config.sparsity` and solve for the weights that stay.

    Args:
        weights: linear -> dense W (O, I) float32; they all read the input that `moment` describes.
        moment: statistics over every domain.

    Returns:
        linear -> W' (O, I) float32, with the same number of zeros in each row.

    Raises:
        NumericsError: a solution is not finite.
    """
    dense = torch.cat(list(weights.values()))  # rows do not touch one another: one large product is faster
    squares = moment.gradient
    gradient = torch.cat([squares[name] for name in weights]) if squares else None
    observed = moment.second
    second = damped(observed, config.damping)
    solution, target = dense, dense @ second
    for share in config.rounds:
        mask = row_mask(scores(solution, observed, gradient), share * config.sparsity)
        solution = masked_solve(target, solution, mask, second, iterations=config.iterations)
    if not solution.isfinite().all():
        raise NumericsError(f"the solved weights of {next(iter(weights))} are not finite: raise prune.damping")
    parts = torch.split(solution, [len(weight) for weight in weights.values()])
    return dict(zip(weights, parts, strict=True))
