"""The lines that the terminal shows: the only place that prints any."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

from flows.uris import without_secrets

__all__ = ["LogLines", "write"]


def write(text: str, stream: TextIO | None = None) -> None:
    """Print lines on standard output, or on `stream`, fit to be shown."""
    print(_fit(text), file=sys.stdout if stream is None else stream, flush=True)


class LogLines(logging.Formatter):
    """What is logged, fit to be shown."""

    def format(self, record: logging.LogRecord) -> str:
        return _fit(super().format(record))


def _fit(text: str) -> str:
    return without_secrets(text)
