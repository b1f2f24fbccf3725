"""From scores to masks, and sparsity as counted.

Shapes: O out features, I in features, M weights of a group in an N:M pattern, of which N stay.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from copal.config import Pattern, PruneConfig

__all__ = ["counted_mask", "follows", "kept_per_row", "pattern_mask", "row_mask", "sorted_rows", "sparse_mask", "zeros"]


def kept_per_row(in_features: int, sparsity: float) -> int:
    """How many weights of a row stay: I minus the nearest whole number to `sparsity` * I, at least 1."""
    return max(1, in_features - round(sparsity * in_features))


def row_mask(scores: Tensor, sparsity: float) -> Tensor:
    """Boolean (O, I), true for the highest `scores` (O, I) of each row: the same number in every row.

    Comparing within rows, not over the whole matrix, keeps every output equally well fed (Sun et al. 2023).
    """
    rows, features = scores.shape
    return counted_mask(scores, torch.full((rows,), features - kept_per_row(features, sparsity), device=scores.device))


def counted_mask(scores: Tensor, zeros: Tensor) -> Tensor:
    """Boolean (O, I), false for the `zeros` (O,) lowest `scores` (O, I) of each row; of equal ones the first go."""
    zeros = zeros.long().unsqueeze(1)
    highest = sorted_rows(scores).gather(1, (zeros - 1).clamp(min=0))  # of those that go
    highest = torch.where(zeros > 0, highest, -torch.inf)
    mask = scores > highest
    spare = (~mask).sum(1, keepdim=True) - zeros
    if spare.any():
        equal = scores == highest
        mask |= equal & (equal.flip(1).cumsum(1).flip(1) <= spare)
    return mask


def sorted_rows(values: Tensor) -> Tensor:
    """`values` (O, I), each row from low to high."""
    if values.device.type == "cpu":  # numpy has vector instructions for it: 25 times faster than torch, measured
        return torch.from_numpy(np.sort(values.numpy(), axis=1))
    return values.sort(dim=1).values


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


def sparse_mask(scores: Tensor, config: PruneConfig, share: float = 1.0, zeros: Tensor | None = None) -> Tensor:
    """Boolean (O, I), false for `share` of the zeros that `config.sparsity` asks for: the lowest scores.

    `zeros`: of each row (O,); None: the same of all, or as the pattern wants.
    """
    if config.pattern:
        return pattern_mask(scores, config.pattern, share)
    if zeros is not None:
        return counted_mask(scores, (share * zeros).round())
    return row_mask(scores, share * config.share)


def follows(weight: Tensor, pattern: Pattern) -> bool:
    """Whether every group of M neighbours in the rows of `weight` (O, I) has at most N weights that are not zero."""
    if weight.shape[1] % pattern.of:
        return False
    return bool((weight.reshape(-1, pattern.of).count_nonzero(1) <= pattern.kept).all())


def zeros(weight: Tensor) -> int:
    """Number of weights that are exactly zero."""
    return weight.numel() - int(weight.count_nonzero())
