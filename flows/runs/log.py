"""Where the lines of a flow go."""

from __future__ import annotations

import logging

from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger

from flows.terminal.lines import fit, write

__all__ = ["note", "tell"]


def tell(line: str) -> None:
    """Say a line that somebody should see: in the log of the run, or on the terminal where no such log is kept."""
    if not note(line):
        write(line)


def note(line: str) -> bool:
    """Say a line in the log of the run, which the page of the run shows; returns whether it was logged.

    It is not where the command line runs a flow, which shows its user no log of Prefect's, nor outside a run.
    """
    try:
        log = get_run_logger()
    except MissingContextError:
        return False
    log.info(fit(line))
    return log.isEnabledFor(logging.INFO)
