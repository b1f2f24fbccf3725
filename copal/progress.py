"""How the library tells its caller that something long is getting on: a function, called often, cheap to ignore."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Progress", "silent"]

Progress = Callable[[str, int, int], None]
"""progress(stage, done, total)."""


def silent(stage: str, done: int, total: int) -> None:
    """Report to nobody."""
