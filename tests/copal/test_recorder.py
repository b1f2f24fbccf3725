from __future__ import annotations

import pytest
import torch
from torch import nn

from copal.errors import NumericsError
from copal.recorder import MomentRecorder
from copal.sensitivity import scores


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.out = nn.Linear(6, 6, bias=False), nn.Linear(6, 3, bias=False), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = self.query(x) * self.key(x).repeat(1, 1, 2)
        return self.out(mixed)


def test_linears_that_read_the_same_input_share_one_moment_which_is_the_mean_of_x_xt() -> None:
    torch.manual_seed(0)
    block, x = Attention(), torch.randn(4, 5, 6)
    with MomentRecorder(block, gradient=False) as recorder:
        block(x[:2])
        block(x[2:])
    assert recorder.groups() == {"query": ["query", "key"], "out": ["out"]}
    tokens = x.reshape(-1, 6)
    moment = recorder.moments(2.0, "block")["query"]
    torch.testing.assert_close(moment.second, tokens.T @ tokens / 20)
    assert moment.weight == 2.0


def test_what_is_added_to_the_residual_stream_counts_relative_to_the_size_of_that() -> None:
    torch.manual_seed(0)
    block, x = Attention(), torch.randn(2, 5, 6) * torch.logspace(-2, 2, 5)[:, None]
    with MomentRecorder(block, gradient=False) as recorder:
        hidden = block(x).reshape(-1, 6)
        mixed = (block.query(x) * block.key(x).repeat(1, 1, 2)).reshape(-1, 6)
    weighted = mixed / hidden.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(recorder.moments(1.0, "block")["out"].second, weighted.T @ weighted / 10)


def test_a_forward_that_fails_half_way_leaves_no_trace() -> None:
    block, x = Attention(), torch.randn(2, 5, 6)
    with MomentRecorder(block, gradient=False) as recorder:
        with pytest.raises(RuntimeError):
            block(x[..., :5])
        block.key.forward = None  # type: ignore[assignment]
        with pytest.raises(TypeError):
            block(x)
        del block.key.forward
        block(x)
    tokens = x.reshape(-1, 6)
    torch.testing.assert_close(recorder.moments(1.0, "block")["query"].second, tokens.T @ tokens / 10)


def test_sixteen_bit_products_keep_the_diagonal_and_hardly_touch_the_correlations() -> None:
    torch.manual_seed(0)
    block, x = (
        nn.Sequential(nn.Linear(48, 7).bfloat16(), nn.Linear(7, 3).bfloat16()),
        (torch.randn(1500, 48) @ torch.randn(48, 48)).bfloat16(),
    )
    with MomentRecorder(block, gradient=False) as recorder:
        block(x.reshape(3, 500, 48))
    found = recorder.moments(1.0, "block")["0"].second
    expected = x.float().T @ x.float() / 1500
    scale = expected.diagonal().sqrt()
    torch.testing.assert_close(found.diagonal(), expected.diagonal())
    errors = (found - expected) / scale / scale[:, None]
    assert errors.abs().max() < 2**-9
    assert errors.square().mean().sqrt() < 2e-4


def test_gradient_statistic_is_the_root_mean_square_gradient_of_half_the_squared_output() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(4, 3), torch.randn(7, 4)
    block = nn.Sequential(linear, nn.Linear(3, 5))
    with MomentRecorder(block, gradient=True) as recorder:
        block(x)
    squares = []
    for token in x:
        weight = linear.weight.detach().clone().requires_grad_()
        ((weight @ token).square().sum() / 2).backward()
        squares.append(weight.grad.square())
    expected = linear.weight.abs() * torch.stack(squares).mean(0).sqrt()
    moment = recorder.moments(1.0, "block")["0"]
    torch.testing.assert_close(scores(linear.weight, moment.second, 0.5, moment.gradient["0"]), expected)


def test_an_input_that_is_not_finite_names_the_layer() -> None:
    block = nn.Sequential(nn.Linear(4, 3))
    with MomentRecorder(block, gradient=False) as recorder:
        block(torch.full((2, 4), torch.nan))
    with pytest.raises(NumericsError, match=r"layers\.7\.0 are not finite"):
        recorder.moments(1.0, "layers.7")
