"""Memory that runs out: one plain line where nothing smaller can be tried, and heap that is given back in time."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.utils.memory import should_reduce_batch_size

from copal.errors import ResourceError

__all__ = ["memory_error", "memory_for", "trim_heap"]

_SMALLER = (
    "lower model.batch or model.processes, take a larger device, or start a new lineage with a smaller "
    "calibration.window_length"
)


@contextmanager
def memory_for(what: str, advice: str = _SMALLER) -> Iterator[None]:
    """Say it plainly if memory runs out inside the `with`.

    Raises:
        ResourceError: it did.
    """
    try:
        yield
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        raise memory_error(what, advice) from error


def memory_error(what: str, advice: str = _SMALLER) -> ResourceError:
    """What there is not enough memory for, and what to do."""
    return ResourceError(f"memory is not enough for {what}: {advice}")


def trim_heap() -> None:
    """Give freed memory back to the system: glibc keeps what is smaller than 32 MB, and it piles up block by block."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)
