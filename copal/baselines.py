"""What users know, under the signature of `copal.solve.prune_group`.

Given to `prune_step` as `method`. Without a parent a baseline sees the newest domain only; with one, all of them.
What the criterion `loss` says of `zeros` is not for them: each has its own rule.

Shapes: O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from copal.allocation import RowZeros
from copal.config import PruneConfig
from copal.masks import sparse_mask
from copal.sensitivity import Moment, scores
from copal.solve import Pruned, damped

__all__ = ["magnitude", "sparsegpt", "wanda"]


def magnitude(
    weights: Mapping[str, Tensor], moment: Moment, config: PruneConfig, zeros: RowZeros | None = None
) -> Pruned:
    """Keep the largest |W| of each matrix (O, I), or of each group of N:M; `moment` is not used (Han et al. 2015)."""
    pruned = {}
    for name, weight in weights.items():
        compared = weight.abs() if config.pattern else weight.abs().reshape(1, -1)
        pruned[name] = weight * sparse_mask(compared, config).reshape(weight.shape)
    return Pruned(pruned)


def wanda(weights: Mapping[str, Tensor], moment: Moment, config: PruneConfig, zeros: RowZeros | None = None) -> Pruned:
    """Keep the largest |W_kl| sqrt(G_ll) of each row (Sun et al. 2023, arXiv 2306.11695)."""
    second = moment.second
    return Pruned({name: weight * sparse_mask(scores(weight, second, 0.5), config) for name, weight in weights.items()})


def sparsegpt(
    weights: Mapping[str, Tensor],
    moment: Moment,
    config: PruneConfig,
    zeros: RowZeros | None = None,
    columns: int = 128,
) -> Pruned:
    """Prune column by column; the columns after it make good each error (Frantar and Alistarh 2023, arXiv 2301.00774).

    The mask of `columns` columns at a time is the smallest w^2 / [G^-1]_ll^2 over all rows, that of N:M of M columns
    at a time within each row, as in the paper's code.
    """
    system = damped(moment.second, 0.01, next(iter(weights)), by_mean=True)
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(system.second)), upper=True)
    pruned = {name: _sparsegpt(weight.clone(), inverse, config, columns) for name, weight in weights.items()}
    return Pruned(pruned, system.damping)


def _sparsegpt(weight: Tensor, inverse: Tensor, config: PruneConfig, columns: int) -> Tensor:
    group = config.pattern.of if config.pattern else columns
    columns = max(columns // group, 1) * group
    for start in range(0, weight.shape[1], columns):
        block = slice(start, min(start + columns, weight.shape[1]))
        here, root = weight[:, block], inverse[block, block]
        errors, mask = torch.zeros_like(here), torch.ones_like(here, dtype=torch.bool)
        for column in range(here.shape[1]):
            if column % group == 0:
                together = slice(column, column + group)
                saliency = (here[:, together] / root.diagonal()[together]).square()
                compared = saliency if config.pattern else saliency.reshape(1, -1)
                mask[:, together] = sparse_mask(compared, config).reshape(saliency.shape)
            pruned = here[:, column] * mask[:, column]
            errors[:, column] = (here[:, column] - pruned) / root[column, column]
            here[:, column + 1 :] -= torch.outer(errors[:, column], root[column, column + 1 :])
            here[:, column] = pruned
        weight[:, block.stop :] -= errors @ inverse[block, block.stop :]
    return weight
