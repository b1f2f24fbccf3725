"""Where the lines of a flow go."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger

from flows.registry.versions import ModelVersion
from flows.terminal.lines import fit, write

__all__ = ["about_version", "note", "tell"]


def tell(line: str) -> None:
    """Say a line that somebody should see: in the log of the run, or on the terminal where no such log is kept."""
    if not note(line):
        write(line)


def note(line: str, about: Mapping[str, object] | None = None) -> bool:
    """Say a line in the log of the run, which the page of the run shows; returns whether it was logged.

    Args:
        about: fields of the log record beside the line, for logs in JSON.

    It is not where the command line runs a flow, which shows its user no log of Prefect's, nor outside a run.
    """
    try:
        log = get_run_logger()
    except MissingContextError:
        return False
    log.info(fit(line), extra={f"copal_{name}": value for name, value in (about or {}).items()})
    return log.isEnabledFor(logging.INFO)


def about_version(model: str, version: ModelVersion, domain: str) -> dict[str, object]:
    """The fields of a log record that tells of a version."""
    return {"model": model, "version": version.number, "domain": domain, "key": version.key}
