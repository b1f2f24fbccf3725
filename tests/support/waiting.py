"""Waiting: for what happens in other processes, or for nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any


def until(there: Callable[[], Any], seconds: float, what: str) -> Any:
    """What `there` gives when it is true; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    pause = threading.Event()
    while not (found := there()):
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        pause.wait(0.2)
    return found


def work(seconds: float) -> None:
    """Work in Python: where the tests have an alarm of their own, a time limit ends no single long call."""
    pause, end = threading.Event(), time.monotonic() + seconds
    while time.monotonic() < end:
        pause.wait(0.05)
