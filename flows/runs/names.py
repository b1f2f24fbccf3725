"""What a run is called in Prefect's list of runs."""

from __future__ import annotations

import re

from prefect.runtime import flow_run

from copal.errors import CopalError
from flows.project import open_project

__all__ = [
    "adapt_name",
    "adapt_run",
    "promote_run",
    "rollback_run",
    "verify_run",
    "watch_run",
    "withdraw_run",
]

_SHORT = 8  # digits of a commit


def watch_run() -> str:
    """`watch my-llm`."""
    return f"watch{_lineage()}"


def adapt_run() -> str:
    """`adapt legal 3f2a9c01`: the commit, or what else was asked for."""
    asked = flow_run.parameters
    return adapt_name(str(asked.get("domain")), asked.get("rev"))


def adapt_name(domain: str, rev: str | None) -> str:
    """The name of a run that adapts to `domain` at the revision `rev`."""
    if rev is None:
        return f"adapt {domain}"
    return f"adapt {domain} {rev[:_SHORT] if re.fullmatch('[0-9a-f]{40}', rev) else rev}"


def withdraw_run() -> str:
    """`withdraw legal from my-llm`."""
    lineage = _lineage()
    return f"withdraw {flow_run.parameters.get('domain')}{' from' if lineage else ''}{lineage}"


def promote_run() -> str:
    """`promote my-llm version 4`, `promote my-llm challenger`."""
    return f"promote{_lineage()}{_version()}"


def rollback_run() -> str:
    """`rollback my-llm`."""
    return f"rollback{_lineage()}"


def verify_run() -> str:
    """`verify my-llm`, `verify my-llm version 4`."""
    return f"verify{_lineage()}{_version()}"


def _lineage() -> str:
    """The lineage of the workspace that the run is about, after a space; nothing where it cannot be read.

    Where it cannot, the flow itself says what is wrong: a run must not fail for want of a name.
    """
    try:
        return f" {open_project(str(flow_run.parameters.get('workspace'))).name}"
    except CopalError:
        return ""


def _version() -> str:
    version = flow_run.parameters.get("version")
    if version is None:
        return ""
    return f" version {version}" if str(version).isdigit() else f" {version}"
