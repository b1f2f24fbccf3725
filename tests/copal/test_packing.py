from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from copal.packing import fold, pack, pack_low_rank, ranks, unfold, unpack, unpack_low_rank


def plain_moment(features: int, tokens: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    channels = torch.logspace(-3, 3, features)  # massive and faint channels, as in real models
    x = torch.randn(tokens, features, generator=generator) * channels
    return x.T @ x / tokens


def second_moment(features: int, tokens: int, seed: int) -> torch.Tensor:
    """Of inputs with massive and faint channels and few strong directions, as in real models."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(features, features, generator=generator) * torch.logspace(0, -2, features)[:, None]
    x = torch.randn(tokens, features, generator=generator) @ directions * torch.logspace(-3, 3, features)
    return x.T @ x / tokens


def correlations(matrix: torch.Tensor) -> torch.Tensor:
    scale = matrix.diagonal().double().sqrt()
    return matrix.double() / torch.outer(scale, scale)


@given(st.integers(1, 40), st.integers(0, 5))
def test_packing_keeps_the_diagonal_exactly_and_the_rest_to_11_bits(features: int, seed: int) -> None:
    matrix = plain_moment(features, tokens=2 * features, seed=seed)
    found = unpack(*pack(matrix))
    assert torch.equal(found, found.T)
    torch.testing.assert_close(found.diagonal(), matrix.diagonal())
    scale = matrix.diagonal().sqrt()
    assert ((found - matrix).abs() <= 2**-10 * scale * scale[:, None]).all()


@given(st.integers(1, 40))
def test_folding_loses_nothing_and_takes_half_the_room(features: int) -> None:
    matrix = plain_moment(features, tokens=3, seed=1)
    folded = fold(matrix)
    assert torch.equal(unfold(folded, matrix.diagonal()), torch.triu(matrix) + torch.triu(matrix, 1).T)
    assert folded.numel() <= (features + 1) ** 2 / 2


def test_a_dead_channel_survives_packing() -> None:
    matrix = plain_moment(4, tokens=9, seed=0)
    matrix[2] = matrix[:, 2] = 0
    found = unpack(*pack(matrix))
    assert found.isfinite().all()
    assert not found[2].any()


@given(st.integers(2, 48), st.integers(0, 24), st.integers(0, 3))
def test_a_low_rank_has_the_exact_diagonal_and_stays_a_second_moment(features: int, half: int, seed: int) -> None:
    matrix = second_moment(features, tokens=2 * features, seed=seed)
    diagonal, codes, step = pack_low_rank(matrix, min(2 * half, features // 2 * 2))
    found = unpack_low_rank(diagonal, codes, step)
    assert torch.equal(found, found.T)
    assert torch.equal(found.diagonal(), matrix.diagonal())
    assert torch.linalg.eigvalsh(correlations(found)).min() >= -1e-6


@pytest.mark.parametrize(("rank", "error"), [(0, 1.0), (8, 0.4), (16, 0.2), (32, 0.15)])
def test_a_higher_rank_keeps_more_of_the_correlations(rank: int, error: float) -> None:
    matrix = second_moment(64, tokens=512, seed=0)
    kept = correlations(unpack_low_rank(*pack_low_rank(matrix, rank))) - torch.eye(64)
    whole = correlations(matrix) - torch.eye(64)
    assert (kept - whole).norm() <= error * whole.norm()


def test_a_dead_channel_survives_a_low_rank() -> None:
    matrix = second_moment(8, tokens=32, seed=0)
    matrix[2] = matrix[:, 2] = 0
    found = unpack_low_rank(*pack_low_rank(matrix, 4))
    assert found.isfinite().all()
    assert not found[2].any()
    assert not unpack_low_rank(*pack_low_rank(torch.zeros(8, 8), 4)).any()


@given(st.dictionaries(st.text("abc", min_size=1), st.tuples(st.integers(1, 9999), st.integers(1, 9999)), min_size=1),
       st.integers(0, 10**8))  # fmt: skip
def test_ranks_are_even_and_fill_the_size_but_never_more(shapes: dict[str, tuple[int, int]], size: int) -> None:
    found = ranks(shapes, size)
    diagonals = sum(4 * inputs + 8 for _, inputs in shapes.values())
    factors = sum(
        rank * inputs // 2 + 4 * rank for rank, (_, inputs) in zip(found.values(), shapes.values(), strict=True)
    )
    assert all(rank % 2 == 0 and 0 <= rank <= shapes[group][1] for group, rank in found.items())
    assert diagonals + factors <= max(size, diagonals)
    if all(rank < shapes[group][1] - 1 for group, rank in found.items()):
        assert diagonals + factors + sum(inputs + 8 for _, inputs in shapes.values()) >= size  # two more ranks each
