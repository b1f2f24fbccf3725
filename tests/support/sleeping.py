"""An evaluation of fifty domains by toys that sleep where they would compute: how long it takes is how it is shared.

python sleeping.py BASE OUT, in each process; the main one writes to OUT how long the slowest took
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from copal.evaluation import evaluate
from copal.processes import gather, is_main
from copal.streaming import Stream
from support.windows import dialect

DOMAINS, WINDOWS, LENGTH, SECONDS = 50, 5, 8, 0.05  # windows of a domain, their tokens; seconds of a window in a block


def sleep(stream: Stream, block: nn.Module) -> None:
    """In place of running the windows through a block."""
    time.sleep(SECONDS * len(stream.hidden))
    stream._next += 1


def guess(stream: Stream) -> Iterator[tuple[Tensor, Tensor]]:
    """In place of the head."""
    for tokens in stream._tokens:
        for window in tokens.split(1):
            yield window, torch.zeros(1, LENGTH, 128)


def seconds(base: Path) -> float:
    """What it takes all processes together."""
    windows = {f"domain-{number:02d}": dialect(number, WINDOWS, LENGTH) for number in range(DOMAINS)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stream, "advance", sleep)
        patch.setattr(Stream, "logits", guess)
        gather("all are here")
        began = time.perf_counter()
        scores = evaluate(base, windows)
        took = max(gather(time.perf_counter() - began))
    assert {score.tokens for score in scores.values()} == {WINDOWS * (LENGTH - 1)}
    return took


if __name__ == "__main__":
    took = seconds(Path(sys.argv[1]))
    if is_main():
        Path(sys.argv[2]).write_text(json.dumps(took))
