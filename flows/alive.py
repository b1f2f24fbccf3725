"""Which processes of this machine live: told from later ones with the same number by when they started."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil

__all__ = ["find_process"]


def find_process(pid: int, started: float) -> psutil.Process | None:
    """The process with number `pid` that started at `started` (seconds since the epoch); None where it ended."""
    import psutil

    try:
        found = psutil.Process(pid)
        same = abs(found.create_time() - started) < 1.0
        return found if same and found.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None
