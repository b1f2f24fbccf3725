"""How far something long has come, and how long its parts took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

__all__ = ["Clock", "Progress", "silent"]

Progress = Callable[[str, int, int], None]
"""progress(stage, done, total): the library calls it often, and the caller may ignore it."""


def silent(stage: str, done: int, total: int) -> None:
    """Report to nobody."""


class Clock:
    """Adds up the seconds that are spent in named parts of something."""

    def __init__(self, seconds: Mapping[str, float] | None = None) -> None:
        """`seconds`: what they took before."""
        self.seconds = dict(seconds or {})

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - began
