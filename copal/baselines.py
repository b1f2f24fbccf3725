"""What users know, under the signature of `copal.solve.prune_group`.

Given to `prune_step` as `method`. Without a parent a baseline sees the newest domain only; with one, all of them.

Shapes: O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from copal.config import PruneConfig
from copal.masks import row_mask
from copal.sensitivity import Moment, scores
from copal.solve import damped

__all__ = ["magnitude", "sparsegpt", "wanda"]


def magnitude(weights: Mapping[str, Tensor], moment: Moment, config: PruneConfig) -> dict[str, Tensor]:
    """Keep the largest |W| of each matrix (O, I); `moment` is not used (Han et al. 2015)."""
    pruned = {}
    for name, weight in weights.items():
        mask = row_mask(weight.abs().reshape(1, -1), config.sparsity)
        pruned[name] = weight * mask.reshape(weight.shape)
    return pruned


def wanda(weights: Mapping[str, Tensor], moment: Moment, config: PruneConfig) -> dict[str, Tensor]:
    """Keep the largest |W_kl| sqrt(G_ll) of each row (Sun et al. 2023, arXiv 2306.11695)."""
    return {name: weight * row_mask(scores(weight, moment.second), config.sparsity) for name, weight in weights.items()}


def sparsegpt(
    weights: Mapping[str, Tensor], moment: Moment, config: PruneConfig, columns: int = 128
) -> dict[str, Tensor]:
    """Prune column by column; the columns after it make good each error (Frantar and Alistarh 2023, arXiv 2301.00774).

    The mask of `columns` columns at a time is the smallest w^2 / [G^-1]_ll^2 over all rows, as in the paper's code.
    """
    second = damped(moment.second, config.damping)
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(second)), upper=True)
    return {name: _sparsegpt(weight.clone(), inverse, config.sparsity, columns) for name, weight in weights.items()}


def _sparsegpt(weight: Tensor, inverse: Tensor, sparsity: float, columns: int) -> Tensor:
    for start in range(0, weight.shape[1], columns):
        block = slice(start, min(start + columns, weight.shape[1]))
        here, root = weight[:, block], inverse[block, block]
        saliency = (here / root.diagonal()).square().reshape(1, -1)
        mask = row_mask(saliency, sparsity).reshape(here.shape)
        errors = torch.zeros_like(here)
        for column in range(here.shape[1]):
            pruned = here[:, column] * mask[:, column]
            errors[:, column] = (here[:, column] - pruned) / root[column, column]
            here[:, column + 1 :] -= torch.outer(errors[:, column], root[column, column + 1 :])
            here[:, column] = pruned
        weight[:, block.stop :] -= errors @ inverse[block, block.stop :]
    return weight
