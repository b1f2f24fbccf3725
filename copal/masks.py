"""From scores to masks, and sparsity as counted.

Shapes: O out features, I in features, M weights of a group in an N:M pattern, of which N stay.
"""

from __future__ import annotations

import torch
from torch import Tensor

from copal.config import Pattern, PruneConfig

__all__ = ["follows", "kept_per_row", "pattern_mask", "row_mask", "sparse_mask", "zeros"]


def kept_per_row(in_features: int, sparsity: float) -> int:
    """How many weights of a row stay: I minus the nearest whole number to `sparsity` * I, at least 1."""
    return max(1, in_features - round(sparsity * in_features))


def row_mask(scores: Tensor, sparsity: float) -> Tensor:
    """Boolean (O, I), true for the highest `scores` (O, I) of each row: the same number in every row.

    Comparing within rows, not over the whole matrix, keeps every output equally well fed (Sun et al. 2023).
    """
    kept = scores.topk(kept_per_row(scores.shape[1], sparsity), dim=1, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, kept, True)


def pattern_mask(scores: Tensor, pattern: Pattern, share: float = 1.0) -> Tensor:
    """Boolean (O, I), an N:M mask or one on the way to it: true where a weight stays.

    Of the weights that N:M prunes, those with the lowest scores go first: `share` of them in each row (ours). So a
    group of M neighbours never loses more than M - N, and with a share of 1 each keeps exactly N.

    Args:
        scores: (O, I), not negative; I is a multiple of M.
    """
    groups = scores.reshape(len(scores), -1, pattern.of)
    losers = groups.topk(pattern.of - pattern.kept, dim=2, largest=False, sorted=False).indices
    mask = torch.ones_like(groups, dtype=torch.bool).scatter_(2, losers, False).reshape(scores.shape)
    if share == 1.0:
        return mask
    return mask | row_mask(scores.masked_fill(mask, torch.inf), share * pattern.sparsity)


def sparse_mask(scores: Tensor, config: PruneConfig, share: float = 1.0) -> Tensor:
    """Boolean (O, I), false for `share` of the zeros that `config.sparsity` asks for: the lowest scores."""
    if config.pattern:
        return pattern_mask(scores, config.pattern, share)
    return row_mask(scores, share * config.share)


def follows(weight: Tensor, pattern: Pattern) -> bool:
    """Whether every group of M neighbours in the rows of `weight` (O, I) has at most N weights that are not zero."""
    if weight.shape[1] % pattern.of:
        return False
    return bool((weight.reshape(-1, pattern.of).count_nonzero(1) <= pattern.kept).all())


def zeros(weight: Tensor) -> int:
    """Number of weights that are exactly zero."""
    return weight.numel() - int(weight.count_nonzero())
