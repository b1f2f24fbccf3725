from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from copal.baselines import magnitude, sparsegpt, wanda
from copal.config import Pattern, PruneConfig
from copal.errors import NumericsError
from copal.masks import follows, kept_per_row, pattern_mask, row_mask, zeros
from copal.sensitivity import Moment, output_energy
from copal.solve import damped, masked_solve, prune_group


def problem(rows: int, features: int, seed: int) -> tuple[torch.Tensor, Moment]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator)
    x = torch.randn(4 * features, features, generator=generator) @ mixing
    return torch.randn(rows, features, generator=generator), Moment(x.T @ x / len(x), 1.0)


def test_conjugate_gradient_finds_the_least_squares_solution_of_each_row() -> None:
    weight, moment = problem(5, 16, seed=0)
    second = damped(moment.second, 0.01, "a").second
    mask = row_mask(weight.abs(), 0.5)
    solved = masked_solve(weight @ second, weight, mask, second, iterations=200, tolerance=1e-7)
    for row in range(5):
        kept = mask[row]
        target = second[kept] @ weight[row]
        expected = torch.linalg.solve(second[kept][:, kept], target)
        torch.testing.assert_close(solved[row, kept], expected, rtol=1e-3, atol=1e-4)
    assert not solved[~mask].any()


@settings(max_examples=25)
@given(st.integers(1, 6), st.integers(4, 24), st.floats(0.1, 0.9), st.integers(0, 9))
def test_solving_is_never_worse_on_its_own_loss_than_masking_alone(
    rows: int, features: int, sparsity: float, seed: int
) -> None:
    weight, moment = problem(rows, features, seed)
    second = damped(moment.second, 0.01, "a").second
    mask = row_mask(weight.abs(), sparsity)
    solved = masked_solve(weight @ second, weight, mask, second, iterations=5)
    assert output_energy(weight - solved, second) <= output_energy(weight - weight * mask, second) * (1 + 1e-5)


def test_linears_of_a_group_are_pruned_as_if_each_were_alone() -> None:
    weight, moment = problem(6, 16, seed=3)
    together = prune_group({"q": weight[:4], "k": weight[4:]}, moment, PruneConfig()).weights
    alone = prune_group({"k": weight[4:]}, moment, PruneConfig()).weights
    torch.testing.assert_close(together["k"], alone["k"])


@pytest.mark.parametrize("method", [prune_group, magnitude, wanda, sparsegpt])
@given(sparsity=st.floats(0.05, 0.95), features=st.integers(4, 33))
@settings(max_examples=15)
def test_sparsity_as_counted_is_the_target_to_the_nearest_weight(method, sparsity: float, features: int) -> None:
    weight, moment = problem(3, features, seed=1)
    pruned = method({"a": weight}, moment, PruneConfig(sparsity=sparsity)).weights["a"]
    assert abs(zeros(pruned) - sparsity * weight.numel()) <= 0.5 * len(weight) + 1
    assert pruned.isfinite().all()


@pytest.mark.parametrize("method", [prune_group, magnitude, wanda, sparsegpt])
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4"])
def test_every_group_of_a_pattern_keeps_as_many_as_it_says(method, pattern: str) -> None:
    weight, moment = problem(5, 24, seed=6)
    config = PruneConfig(sparsity=pattern)
    pruned = method({"a": weight}, moment, config).weights["a"]
    assert ((pruned != 0).reshape(5, -1, config.pattern.of).sum(2) == config.pattern.kept).all()
    assert follows(pruned, config.pattern)
    pruned[0, pruned[0] == 0] = 1.0
    assert not follows(pruned, config.pattern)


@given(st.floats(0.1, 1.0), st.sampled_from([Pattern(2, 4), Pattern(4, 8), Pattern(1, 3)]), st.integers(0, 9))
def test_on_the_way_to_a_pattern_no_group_loses_more_than_it_will(share: float, pattern: Pattern, seed: int) -> None:
    scores = torch.rand(3, 24, generator=torch.Generator().manual_seed(seed))
    mask, last = pattern_mask(scores, pattern, share), pattern_mask(scores, pattern)
    assert not (last & ~mask).any()
    assert abs(int((~mask).sum()) - share * pattern.sparsity * mask.numel()) <= 0.5 * len(mask) + 1


@given(st.integers(1, 50), st.floats(0.01, 0.99))
def test_at_least_one_weight_of_a_row_stays(features: int, sparsity: float) -> None:
    assert 1 <= kept_per_row(features, sparsity) <= features


@pytest.mark.parametrize(
    "second",
    [
        torch.zeros(8, 8),  # nothing reached the layer
        torch.diag(torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0])),  # dead channels
        torch.ones(8, 8),  # rank one
        torch.ones(8, 8) - 0.01 * torch.eye(8),  # indefinite by a rounding
    ],
    ids=["no-tokens", "dead", "singular", "indefinite"],
)
def test_degenerate_statistics_give_finite_weights(second: torch.Tensor) -> None:
    torch.manual_seed(0)
    pruned = prune_group({"a": torch.randn(4, 8)}, Moment(second, 1.0), PruneConfig()).weights["a"]
    assert pruned.isfinite().all()
    assert zeros(pruned) == 16


def test_damping_grows_until_the_system_is_positive_definite_and_is_told() -> None:
    torch.manual_seed(0)
    indefinite = torch.ones(8, 8) - 0.2 * torch.eye(8)
    pruned = prune_group({"a": torch.randn(4, 8)}, Moment(indefinite, 1.0), PruneConfig())
    assert pruned.damping == 1.0


def test_statistics_of_no_input_are_refused_by_the_name_of_the_layer() -> None:
    with pytest.raises(NumericsError, match=r"statistics of mlp\.up_proj"):
        prune_group({"mlp.up_proj": torch.randn(4, 8)}, Moment(torch.full((8, 8), torch.nan), 1.0), PruneConfig())


def test_sixteen_bit_products_lose_little() -> None:
    weight, moment = problem(32, 64, seed=5)
    second = damped(moment.second, 0.1, "a").second
    losses = [
        output_energy(weight - prune_group({"a": weight}, moment, PruneConfig(), products=dtype).weights["a"], second)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.parametrize("method", [prune_group, sparsegpt])
def test_updating_the_weights_that_stay_beats_masking_alone(method) -> None:
    weight, moment = problem(32, 48, seed=2)
    second = damped(moment.second, 0.01, "a").second
    pruned = method({"a": weight}, moment, PruneConfig()).weights["a"]
    masked = weight * (pruned != 0)
    assert output_energy(weight - pruned, second) < 0.9 * output_energy(weight - masked, second)


def test_wanda_keeps_what_massive_channels_need_and_magnitude_does_not() -> None:
    weight, _ = problem(8, 16, seed=2)
    channels = Moment(torch.diag(torch.logspace(-3, 3, 16)), 1.0)
    loss = {
        method: output_energy(weight - method({"a": weight}, channels, PruneConfig()).weights["a"], channels.second)
        for method in (wanda, magnitude)
    }
    assert loss[wanda] < 0.1 * loss[magnitude]


def test_sparsegpt_in_one_block_of_columns_is_the_optimal_update_column_by_column() -> None:
    """Against the textbook form: after each column the rest is re-solved for, with what went before held fixed."""
    weight, moment = problem(3, 8, seed=4)
    second = damped(moment.second, 0.01, "a", by_mean=True).second
    found = sparsegpt({"a": weight}, moment, PruneConfig(), columns=8).weights["a"]
    expected = weight.clone()
    for column in range(7):
        fixed = expected.clone()
        fixed[:, column] *= (found[:, column] != 0).float()
        done, rest = slice(0, column + 1), slice(column + 1, 8)
        error = (weight - fixed)[:, done]
        expected = fixed
        expected[:, rest] = weight[:, rest] + torch.linalg.solve(second[rest, rest], (error @ second[done, rest]).T).T
    expected[:, 7] *= (found[:, 7] != 0).float()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_golden_numbers_hold_refactors_still() -> None:
    weight = torch.linspace(-1, 1, 24).reshape(2, 12).sin()
    x = torch.sin(torch.arange(360.0).square()).reshape(30, 12)
    pruned = prune_group({"a": weight}, Moment(x.T @ x / 30, 1.0), PruneConfig()).weights["a"]
    golden = torch.tensor([-0.6901, -0.8363, -0.7076, -0.6995, -0.6529, -0.3548, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(pruned[0], golden, rtol=0, atol=2e-4)
