"""The flow `watch`: a reconciler. Whatever woke it, it compares and runs what is pending, in order."""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from copal.errors import CopalError
from flows.launch import run_adapt
from flows.reconcile import plan
from flows.registry import open_registry
from flows.settings import load_settings, open_workspace

__all__ = ["RefusedError", "watch"]


class RefusedError(CopalError):
    """Some dataset versions could not be adapted to; the others were."""


@flow(name="watch")
def watch(workspace: str) -> list[int]:
    """Run one step for every pending dataset version, oldest change first.

    A dataset that is refused does not keep the others waiting: the order of steps does not change where they end.

    Returns:
        The numbers of the versions that were made.

    Raises:
        CopalError: a dataset was refused; says which and why. The others were adapted to.
    """
    work = open_workspace(Path(workspace))
    settings = load_settings(work.params)
    found = plan(work, settings, open_registry(work, settings))
    made: list[int] = []
    refused = list(found.problems)
    for version in found.pending:
        try:
            number = run_adapt(workspace, version.domain, version.git_rev)
        except CopalError as error:
            refused.append(f"{version.path}: {error}" if version.path not in str(error) else str(error))
            continue
        if number is not None:
            made.append(number)
    if refused:
        raise RefusedError("; ".join(refused))
    return made
