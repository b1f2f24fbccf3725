"""How long a step may take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from copal.errors import CopalError

__all__ = ["TimeLimitError", "time_limit"]


class TimeLimitError(CopalError):
    """A step took longer than the settings allow."""


class _OutOfTimeError(TimeoutError):
    """Our own time limit, to tell it from a timeout of another library."""


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """End the `with` after so many seconds; None is never.

    Raises:
        TimeLimitError: it took longer.
    """
    if seconds is None:
        yield
        return
    from prefect.utilities.timeout import timeout  # brings Prefect, which a step by hand can do without

    try:
        with timeout(seconds=seconds, timeout_exc_type=_OutOfTimeError):
            yield
    except _OutOfTimeError as error:
        raise TimeLimitError(
            f"the step took longer than run.time_limit, {seconds:g} s, and was stopped; what it has finished stays "
            "for the next run: raise the limit, or give it a faster machine"
        ) from error
