from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from copal.sensitivity import Moment, merge


def second_moment(features: int, tokens: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    channels = torch.logspace(-3, 3, features)  # massive and faint channels, as in real models
    x = torch.randn(tokens, features, generator=generator) * channels
    return x.T @ x / tokens


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=5), st.randoms(use_true_random=False))
def test_merging_is_the_weighted_mean_whatever_the_order(weights: list[float], random) -> None:
    moments = [Moment(second_moment(5, 20, seed) * weight, weight) for seed, weight in enumerate(weights)]
    expected = sum(m.total.double() for m in moments) / sum(weights)
    random.shuffle(moments)
    merged = moments[0]
    for moment in moments[1:]:
        merged = merge(merged, moment)
    scale = expected.diagonal().sqrt()
    assert ((merged.second - expected).abs() <= 1e-6 * scale * scale[:, None]).all()
    assert merged.weight == pytest.approx(sum(weights))
