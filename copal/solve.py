"""Masked least squares: the weights that stay make up for those that go.

For one linear, minimise tr((W' - W) G (W' - W)^T) over the weights W' that a mask lets stay, for all rows at once, by
conjugate gradient with products by G only. The mask is found on the way: rounds of growing sparsity, each of which
scores the weights that the round before solved for (iterative pruning with an exact second-order update; ours).

Shapes: O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from copal.config import PruneConfig
from copal.errors import NumericsError
from copal.masks import sparse_mask
from copal.sensitivity import Moment, scores

__all__ = ["Damped", "Pruned", "damped", "masked_solve", "prune_group"]


@dataclass(frozen=True, slots=True)
class Damped:
    """A second moment made positive definite.

    Attributes:
        second: (I, I).
        damping: what was added to its diagonal, as a share of the mean of that.
    """

    second: Tensor
    damping: float


@dataclass(frozen=True, slots=True)
class Pruned:
    """The linears of a group after pruning.

    Attributes:
        weights: linear -> W' (O, I) float32.
        damping: see `Damped`; None where no system was solved.
    """

    weights: Mapping[str, Tensor]
    damping: float | None = None


def damped(second: Tensor, damping: float, where: str = "") -> Damped:
    """G + damping * mean(diag G) * identity; the identity itself where no token reached the layer.

    A G that is still not positive definite (what was packed to 16 bits may be indefinite) gets ten times the damping
    until it is.

    Raises:
        NumericsError: it is not with a hundred times the mean of its diagonal either; names the group `where`.
    """
    mean = second.diagonal().mean()
    if mean == 0:
        return Damped(torch.eye(len(second), device=second.device), damping)
    while damping <= 100 and mean.isfinite():
        candidate = second.clone()
        candidate.diagonal().add_(damping * mean)
        if not torch.linalg.cholesky_ex(candidate).info:
            return Damped(candidate, damping)
        damping *= 10
    raise NumericsError(
        f"the statistics of {where} are not those of any input: the state is damaged; replace the domain"
    )


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


def prune_group(weights: Mapping[str, Tensor], moment: Moment, config: PruneConfig) -> Pruned:
    """Prune the linears of a group to `config.sparsity` and solve for the weights that stay.

    Args:
        weights: linear -> dense W (O, I) float32; they all read the input that `moment` describes.
        moment: statistics over every domain.

    Returns:
        The same number of zeros in each row.

    Raises:
        NumericsError: a solution is not finite.
    """
    dense = torch.cat(list(weights.values()))  # rows do not touch one another: one large product is faster
    squares = moment.gradient
    gradient = torch.cat([squares[name] for name in weights]) if squares else None
    observed = moment.second
    system = damped(observed, config.damping, next(iter(weights)))
    solution, target = dense, dense @ system.second
    for share in config.rounds:
        mask = sparse_mask(scores(solution, observed, gradient), config, share)
        solution = masked_solve(target, solution, mask, system.second, iterations=config.iterations)
    if not solution.isfinite().all():
        raise NumericsError(f"the solved weights of {next(iter(weights))} are not finite: raise prune.damping")
    parts = torch.split(solution, [len(weight) for weight in weights.values()])
    return Pruned(dict(zip(weights, parts, strict=True)), system.damping)
