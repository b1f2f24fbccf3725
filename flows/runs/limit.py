"""How long a step may take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from copal.errors import CopalError

__all__ = ["TimeLimitError", "time_limit"]


class TimeLimitError(CopalError):
    """A step took longer than the settings allow."""


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """End the `with` after so many seconds; None is never.

    The interruption can arrive in the middle of a library, whose own clean-up may then fail and raise an error of its
    own. So whatever error comes out after the last second tells of the limit.

    Raises:
        TimeLimitError: it took longer.
    """
    if seconds is None:
        yield
        return
    from prefect.utilities.timeout import timeout  # brings Prefect, which a step by hand can do without

    end = time.monotonic() + seconds
    try:
        with timeout(seconds=seconds):
            yield
    except Exception as error:
        if time.monotonic() < end:
            raise
        raise TimeLimitError(
            f"the step took longer than run.time_limit, {seconds:g} s, and was stopped; what it has finished stays "
            "for the next run: raise the limit, or give it a faster machine"
        ) from error
