"""Labels are drawn with the model's own probabilities, and the gradient against them is autograd's."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from copal.labels import chances, draw, loss_gradient


def test_labels_come_as_often_as_the_model_says() -> None:
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0]).expand(20_000, -1)
    labels = draw(probabilities, chances(torch.arange(20_000)))
    torch.testing.assert_close(labels.bincount(minlength=6) / 20_000, probabilities[0], rtol=0, atol=0.02)
    assert not ((labels == 0) | (labels == 2) | (labels == 5)).any()


@pytest.mark.parametrize(("chance", "label"), [(0.0, 1), (0.49, 1), (0.5, 2), (1 - 2**-24, 2)])
def test_the_ends_of_chance_draw_what_can_come(chance: float, label: int) -> None:
    assert draw(torch.tensor([[0.0, 0.5, 0.5]]), torch.tensor([chance])).tolist() == [label]


def test_a_window_draws_the_same_wherever_it_stands_and_others_draw_otherwise() -> None:
    one, other = torch.arange(64), torch.arange(1, 65)
    assert torch.equal(chances(one), chances(torch.stack([other, one])[1]))
    assert not torch.equal(chances(one), chances(other))


@pytest.mark.parametrize("tokens", [7, 64, 150])
def test_the_gradient_is_that_of_autograd(tokens: int) -> None:
    window = torch.arange(tokens)
    logits = torch.randn(tokens, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = F.cross_entropy(logits, draw(logits.detach().softmax(-1), chances(window)), reduction="sum")
    torch.testing.assert_close(loss_gradient(logits.detach(), window), *torch.autograd.grad(loss, logits))
