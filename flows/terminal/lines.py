"""The lines that the terminal shows: the only place that prints any."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

from copal.printable import printable_lines
from flows.uris import without_secrets

__all__ = ["LogLines", "fit", "write"]


def fit(text: str) -> str:
    """`text` fit to be shown: without passwords, and without what a terminal would obey."""
    return printable_lines(without_secrets(text))


def write(text: str, stream: TextIO | None = None) -> None:
    """Print lines on standard output, or on `stream`, fit to be shown."""
    print(fit(text), file=sys.stdout if stream is None else stream, flush=True)


class LogLines(logging.Formatter):
    """What is logged, fit to be shown."""

    def format(self, record: logging.LogRecord) -> str:
        return fit(super().format(record))
