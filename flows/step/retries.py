"""When a task of a step is tried again: where time can help (a network, a registry that is busy), and not against what
a user has to mend."""

from __future__ import annotations

from copal.errors import CopalError

__all__ = ["PAUSES", "may_pass"]

PAUSES = (2.0, 10.0)  # seconds before the second and the third try


def may_pass(error: object) -> bool:
    """Whether trying again can help, after what a task raised."""
    return isinstance(error, Exception) and not isinstance(error, CopalError)
