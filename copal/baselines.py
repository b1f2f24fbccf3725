"""What users know, under the signature of `copal.solve.prune_group`: masks alone, what stays is left as it is.

Given to `prune_step` as `method`. Without a parent a baseline sees the newest domain only; with one, all of them.

Shapes: O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from copal.config import PruneConfig
from copal.masks import row_mask
from copal.sensitivity import Moment, scores

__all__ = ["magnitude", "wanda"]


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
