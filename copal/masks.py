"""From scores to masks, and sparsity as counted.

Shapes: O out features, I in features.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["kept_per_row", "row_mask", "zeros"]


def kept_per_row(in_features: int, sparsity: float) -> int:
    """How many weights of a row stay: I minus the nearest whole number to `sparsity` * I, at least 1."""
    return max(1, in_features - round(sparsity * in_features))


def row_mask(scores: Tensor, sparsity: float) -> Tensor:
    """Boolean (O, I), true for the highest `scores` (O, I) of each row: the same number in every row.

    Comparing within rows, not over the whole matrix, keeps every output equally well fed (Sun et al. 2023).
    """
    kept = scores.topk(kept_per_row(scores.shape[1], sparsity), dim=1, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, kept, True)


def zeros(weight: Tensor) -> int:
    """Number of weights that are exactly zero."""
    return weight.numel() - int(weight.count_nonzero())
