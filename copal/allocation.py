"""How many zeros each row gets, where the loss decides (criterion `loss`).

A weight is worth f_k W_kl^2 G_ll: what the loss minds if it goes (`copal.fisher`). One threshold over the whole model
says how many weights of each row are worth less; no row strays from the sparsity asked for by more than
`PruneConfig.spread`. Which weights of a row go is not decided here: the rounds of `copal.solve` do that. That weights
are compared over a whole network by what the loss minds is as in Optimal Brain Damage (LeCun et al. 1989); outputs in
place of weights, and bounds for rows, are ours.

No second copy of the weights is kept: of each row, the prices of at most `_STEPS` steps from its fewest to its most
zeros, and of the whole model one histogram of prices.

Shapes: O out features, I in features, S steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from copal.config import PruneConfig
from copal.masks import kept_per_row, sorted_rows

__all__ = ["Prices", "RowZeros", "Threshold", "row_prices"]

RowZeros = Mapping[str, Tensor]
"""Linear -> how many weights of each of its rows go (O,) int32."""

_STEPS = 64
_HIGHEST = 0.95  # share of a row's zeros, unless more are asked for: something has to make up for them
_DROPPED = 12  # bits of a float32: prices within 2^-11 of one another count as equal
_BINS = (0x7F800000 >> _DROPPED) + 1  # up to infinity


@dataclass(frozen=True, slots=True)
class Prices:
    """What the zeros of one linear cost.

    Attributes:
        counts: (S + 1,) int32, zeros of a row before the first step and after each; from the fewest to the most.
        prices: (O, S) float32 on the CPU, rising in each row: what the dearest weight of a step is worth.
        uniform: zeros of a row if all rows of the model had the same share.
    """

    counts: Tensor
    prices: Tensor
    uniform: int


def row_prices(weight: Tensor, fisher: Tensor, squares: Tensor, config: PruneConfig) -> Prices:
    """The prices of one linear.

    Args:
        weight: dense W (O, I).
        fisher: f (O,), or a multiple of it that is the same for the whole model.
        squares: diagonal of G (I,), likewise.
    """
    features = weight.shape[1]
    uniform, fewest, most = (
        features - kept_per_row(features, share)
        for share in (
            config.share,
            max(0.0, config.share - config.spread),
            max(config.share, min(_HIGHEST, config.share + config.spread)),
        )
    )
    counts = torch.linspace(fewest, most, min(_STEPS, most - fewest) + 1, dtype=torch.float64).round().int()
    worth = weight.square() * squares.clamp_min(0) * fisher.unsqueeze(1)
    dearest = (counts[1:] - 1).to(worth.device, torch.int64)
    return Prices(counts, sorted_rows(worth)[:, dearest].cpu(), uniform)


class Threshold:
    """Which steps are taken: the cheapest of all, as many as make the zeros of uniform rows.

    All linears are counted first, and then each is asked about, in the same order. Of steps whose price is the
    threshold's, the first that are asked about are taken, the last of them in part.
    """

    def __init__(self) -> None:
        self._histogram = torch.zeros(_BINS, dtype=torch.float64)
        self._left = 0

    def count(self, linear: Prices) -> None:
        """See the steps of a linear."""
        widths = linear.counts.diff().expand(linear.prices.shape).reshape(-1)
        self._histogram += torch.bincount(_bins(linear.prices).reshape(-1), weights=widths.double(), minlength=_BINS)
        self._left += len(linear.prices) * (linear.uniform - int(linear.counts[0]))

    def settle(self) -> None:
        """Everything is counted: find the threshold."""
        taken = self._histogram.cumsum(0)
        self._bin = torch.searchsorted(taken, torch.tensor(self._left, dtype=torch.float64), right=True)
        self._left -= int(taken[self._bin - 1]) if self._bin else 0

    def zeros(self, linear: Prices) -> Tensor:
        """The zeros of each row of a linear that was counted (O,) int32."""
        bins, sought = _bins(linear.prices), self._bin.expand(len(linear.prices), 1).contiguous()
        below, at_most = (linear.counts[torch.searchsorted(bins, sought, right=right)[:, 0]] for right in (False, True))
        equal = at_most - below
        more = (self._left - (equal.cumsum(0) - equal)).clamp(min=0).minimum(equal)
        self._left -= int(more.sum())
        return (below + more).int()


def _bins(prices: Tensor) -> Tensor:
    """The bin of each price: floats that are not negative are in the order of their bits."""
    return prices.view(torch.int32) >> _DROPPED
