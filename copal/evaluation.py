"""Perplexity of a checkpoint on domains, and what a step did to the domains before it.

Shapes: N windows, L tokens of a window, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from copal.errors import NumericsError
from copal.processes import gather, share_of_domains
from copal.progress import Progress, silent
from copal.streaming import StreamedModel, place

__all__ = ["HIDDEN_BYTES", "Score", "backward_transfer", "evaluate", "geometric_mean"]

HIDDEN_BYTES = 10**9
"""What the hidden states of all evaluation windows may take between two blocks."""


@dataclass(frozen=True, slots=True)
class Score:
    """How well a model predicts a domain's evaluation windows.

    Attributes:
        nats: summed negative log-likelihood of the predicted tokens, in nats.
        tokens: number of predicted tokens: all of a window but its first.
    """

    nats: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(nats / tokens): weighted by tokens, not a mean of the windows' perplexities."""
        return math.exp(self.nats / self.tokens)


def evaluate(
    folder: Path,
    windows: Mapping[str, Tensor],
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    batch: int = 8,
    hidden_bytes: int = HIDDEN_BYTES,
    progress: Progress = silent,
) -> dict[str, Score]:
    """Score the checkpoint in `folder` on every domain's windows in one walk over its blocks.

    Where several processes do it together, each scores its share of all domains' windows, and all get the whole scores.

    Args:
        folder: a Hugging Face folder with safetensors weights.
        windows: domain -> (N, L) tokens.
        device: None: this process's own GPU, or the CPU.
        dtype: of the forward pass; None: the fastest here.
        batch: windows that run through a block at a time; halved where memory runs out. Scores differ by rounding only.
        hidden_bytes: that all windows may take between two blocks (tokens x hidden size x bytes of `dtype`); while a
            block runs, one domain's are there twice. What is more goes in further walks, a batch at least in each;
            scores are the same to the last bit.

    Raises:
        ModelError: `folder` cannot be read as a causal language model.
        NumericsError: hidden states or the loss on a domain are not finite; names the domain and where it began.
        ResourceError: memory is not enough for one window at a time.
        SettingsError: more processes than windows.
    """
    device, dtype = place(device, dtype)
    model = StreamedModel(folder, device=device, dtype=dtype)
    walks = _walks(model, share_of_domains(windows), batch, hidden_bytes)
    done, total = 0, len(walks) * len(model) + sum(map(len, walks))  # the head is worth a block

    def tell() -> None:
        nonlocal done
        done += 1
        progress("evaluate", done, total)

    sums = dict.fromkeys(windows, (0.0, 0))
    for parts in walks:
        _walk(model, parts, batch, sums, tell)
    scores = {}
    for domain in windows:
        shares = gather(sums[domain])
        nats, tokens = sum(nats for nats, _ in shares), sum(tokens for _, tokens in shares)
        if not math.isfinite(nats):
            raise NumericsError(f"on {domain}: the loss of {folder} is {nats}: check its last norm and its head")
        scores[domain] = Score(nats, tokens)
    return scores


def _walks(
    model: StreamedModel, windows: Mapping[str, Tensor], batch: int, hidden_bytes: int
) -> list[dict[str, Tensor]]:
    """The windows of each walk: whole batches, for a batch's shape decides how its sums are rounded."""
    walks: list[dict[str, list[Tensor]]] = []
    room = 0
    for domain, tokens in windows.items():
        of_a_window = model.start(tokens[:1], 1).hidden.nbytes
        for part in torch.split(tokens, batch):
            if not walks or len(part) * of_a_window > room:
                walks.append({})
                room = hidden_bytes
            walks[-1].setdefault(domain, []).append(part)
            room -= len(part) * of_a_window
    return [{domain: torch.cat(parts) for domain, parts in walk.items()} for walk in walks]


def _walk(
    model: StreamedModel,
    windows: Mapping[str, Tensor],
    batch: int,
    sums: dict[str, tuple[float, int]],
    tell: Callable[[], None],
) -> None:
    """Run `windows` through all blocks and add their (nats, tokens) to `sums`; what it keeps meanwhile goes with it."""
    streams = {domain: model.start(tokens, batch) for domain, tokens in windows.items()}
    for index in range(len(model)):
        with model.block(index) as block:
            for domain, stream in streams.items():
                try:
                    stream.advance(block)
                except NumericsError as error:
                    raise NumericsError(f"on {domain}: {error}") from error
        tell()
    for domain, stream in streams.items():
        nats, tokens = sums[domain]
        for window, logits in stream.logits():
            targets = window[0, 1:]
            nats += F.cross_entropy(logits[0, :-1].float(), targets, reduction="sum").item()
            tokens += targets.numel()
        sums[domain] = nats, tokens
        tell()


def backward_transfer(when_newest: Mapping[str, float], now: Mapping[str, float]) -> float | None:
    """Mean over the earlier domains of log(perplexity when it was the newest / perplexity now).

    Lopez-Paz and Ranzato, "Gradient Episodic Memory" (2017), eq. 3, on log-likelihood per token in place of accuracy.
    Negative: earlier domains were forgotten. -0.1 is 10.5% more perplexity. None where there is no earlier domain.
    """
    if not when_newest:
        return None
    return sum(math.log(when_newest[domain] / now[domain]) for domain in when_newest) / len(when_newest)


def geometric_mean(values: Sequence[float]) -> float:
    """exp of the mean of the logarithms: the right mean for perplexities of different domains."""
    return math.exp(sum(map(math.log, values)) / len(values))
