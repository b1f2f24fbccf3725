"""Labels that the model draws itself, and the gradient of the loss against them.

The Fisher information of a model is the mean of squared gradients of log p(y) with y drawn from the model. With the
text's own next tokens in place of y, the "empirical" one, a few tokens that the model did not expect decide (Kunstner
et al. 2019, arXiv 1905.12558).

Labels hang on a window's tokens and on the model alone: order of domains, batch and number of processes change nothing.

Shapes: L tokens of a window, T of them at a time, V vocabulary.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

__all__ = ["chances", "draw", "loss_gradient"]

_AT_A_TIME = 64  # tokens: V numbers of each stay in a cache, which is three times faster on a CPU


def loss_gradient(logits: Tensor, window: Tensor) -> Tensor:
    """The gradient (L, V), by `logits` (L, V), of the summed cross-entropy of a window (L,) against drawn labels.

    Probabilities, less 1 for the label: by hand, for it takes half of autograd's time.
    """
    gradient = torch.empty_like(logits)
    parts = [torch.split(part, _AT_A_TIME) for part in (logits, chances(window), gradient)]
    for known, chance, wrong in zip(*parts, strict=True):
        probabilities = known.softmax(-1, dtype=torch.float32)
        label = draw(probabilities, chance).unsqueeze(1)
        wrong.copy_(probabilities.scatter_add_(1, label, torch.full_like(label, -1, dtype=torch.float32)))
    return gradient


def chances(window: Tensor) -> Tensor:
    """A number in [0, 1) for each token of a window (L,): as good as random, and always the same for this window."""
    digest = hashlib.sha256(window.cpu().to(torch.int64).numpy().tobytes()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.rand(len(window), generator=generator).to(window.device)


def draw(probabilities: Tensor, chance: Tensor) -> Tensor:
    """A label (T,) for each row of `probabilities` (T, V): the first whose cumulative probability is above `chance`."""
    sums = probabilities.cumsum(-1)
    found = torch.searchsorted(sums, chance.unsqueeze(1) * sums[:, -1:], right=True)
    return found.squeeze(1).clamp(max=probabilities.shape[1] - 1)
