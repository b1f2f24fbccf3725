"""Token windows without a text."""

from __future__ import annotations

import torch


def dialect(seed: int, windows: int = 8, length: int = 32, vocabulary: int = 128) -> torch.Tensor:
    """(N, L) tokens; each seed speaks another dialect (other tokens, other order)."""
    generator = torch.Generator().manual_seed(seed)
    favoured = torch.rand(vocabulary, generator=generator) ** 4
    drawn = torch.multinomial(favoured, windows * length, replacement=True, generator=generator)
    return drawn.view(windows, length)
