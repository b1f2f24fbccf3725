"""An evaluation of fifty domains by toys that sleep where they would compute: how long it takes is how it is shared.

python sleeping.py BASE OUT, in each process; the main one writes to OUT how long the slowest took
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
from torch import nn

from copal.evaluation import evaluate
from copal.processes import gather, is_main
from copal.streaming import Stream
from support.windows import dialect

DOMAINS, WINDOWS, LENGTH, SECONDS = 50, 5, 8, 0.012  # windows of a domain, their tokens; seconds of a window in a block


def sleep(stream: Stream, block: nn.Module) -> None:
    """In place of running the windows through a block."""
    time.sleep(SECONDS * len(stream.hidden))


def seconds(base: Path) -> float:
    """What it takes all processes together."""
    windows = {f"domain-{number:02d}": dialect(number, WINDOWS, LENGTH) for number in range(DOMAINS)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stream, "advance", sleep)
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
