"""How many zeros each row gets: counted right, within its bounds, and no cheaper choice is there."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from copal.allocation import Prices, Threshold, row_prices
from copal.config import PruneConfig
from copal.masks import counted_mask, kept_per_row


def allocate(linears: list[Prices]) -> list[torch.Tensor]:
    threshold = Threshold()
    for linear in linears:
        threshold.count(linear)
    threshold.settle()
    return [threshold.zeros(linear) for linear in linears]


def made_up(seed: int, shapes: list[tuple[int, int]]) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Weights, Fisher information and squares of linears that differ by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for rows, features in shapes:
        size = 10 ** torch.empty(()).uniform_(-3, 3, generator=generator)
        fisher = torch.rand(rows, generator=generator) ** 4 * size
        found.append((torch.randn(rows, features, generator=generator), fisher, torch.rand(features) * size))
    return found


shapes = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 40)), min_size=1, max_size=5)
shares = st.floats(0.05, 0.95)


@given(shapes, shares, st.floats(0, 0.9), st.integers(0, 99))
def test_the_count_is_that_of_uniform_rows_and_every_row_is_within_its_bounds(shapes, share, spread, seed) -> None:
    config = PruneConfig(sparsity=share, spread=spread)
    linears = [row_prices(*one, config) for one in made_up(seed, shapes)]
    zeros = allocate(linears)
    uniform = sum(rows * (features - kept_per_row(features, share)) for rows, features in shapes)
    assert sum(int(rows.sum()) for rows in zeros) == uniform
    for rows, (_, features) in zip(zeros, shapes, strict=True):
        assert (rows >= min(round(max(0, share - spread) * features), features - kept_per_row(features, share))).all()
        assert (rows <= max(round((share + spread) * features), features - kept_per_row(features, share))).all()
        assert (rows < features).all()


@given(shapes, shares, st.integers(0, 99))
def test_no_zero_that_is_made_costs_more_than_one_that_is_not(shapes, share, seed) -> None:
    """Up to the width of a bin: as good as the best choice within the bounds."""
    linears = [row_prices(*one, PruneConfig(sparsity=share)) for one in made_up(seed, shapes)]
    made, spared = [], []
    for linear, rows in zip(linears, allocate(linears), strict=True):
        taken = linear.counts[1:] <= rows[:, None]
        made.append(linear.prices[taken])
        spared.append(linear.prices[~taken])
    if torch.cat(made).numel() and torch.cat(spared).numel():
        assert torch.cat(made).max() <= torch.cat(spared).min() * (1 + 2**-10)


def test_rows_whose_outputs_the_loss_does_not_mind_give_what_the_others_keep() -> None:
    weight, squares = torch.randn(4, 100, generator=torch.Generator().manual_seed(0)), torch.ones(100)
    fisher = torch.tensor([0.0, 1.0, 1.0, 100.0])
    (zeros,) = allocate([row_prices(weight, fisher, squares, PruneConfig(sparsity=0.5, spread=0.3))])
    assert zeros[0] == 80
    assert zeros[3] == 20
    assert zeros.sum() == 200
    (same,) = allocate([row_prices(weight, 7 * fisher, 3 * squares, PruneConfig(sparsity=0.5, spread=0.3))])
    assert torch.equal(zeros, same)  # only ratios count


def test_equal_prices_are_no_trouble() -> None:
    linear = row_prices(torch.ones(5, 8), torch.ones(5), torch.ones(8), PruneConfig(sparsity=0.5, spread=0.25))
    (zeros,) = allocate([linear])
    assert zeros.sum() == 20
    assert zeros.min() >= 2
    assert zeros.max() <= 6


def test_without_a_spread_rows_are_uniform() -> None:
    linears = [row_prices(*one, PruneConfig(spread=0)) for one in made_up(0, [(3, 16), (2, 10)])]
    assert [rows.tolist() for rows in allocate(linears)] == [[8, 8, 8], [5, 5]]


@pytest.mark.parametrize("features", [1, 7, 64])
def test_a_mask_has_as_many_zeros_as_asked_for_and_they_are_the_lowest(features: int) -> None:
    generator = torch.Generator().manual_seed(features)
    scores = torch.rand(6, features, generator=generator)
    scores[0] = 1.0  # all the same
    zeros = torch.randint(0, features, (6,), generator=generator)
    mask = counted_mask(scores, zeros)
    assert torch.equal((~mask).sum(1), zeros)
    for row, kept in zip(scores, mask, strict=True):
        if not kept.all():
            assert row[~kept].max() <= row[kept].min()
