"""Whatever woke the watcher: the watched branch is compared with the newest version, and what is pending is run."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from copal.errors import CopalError
from flows.data.dataset import MissingDataError
from flows.pending.missing_data import forget, note_missing, waiting
from flows.pending.plan import Plan, plan, refusal_text
from flows.project import Project, hold_lineage, open_project
from flows.step.finish import finish
from flows.workspace import Workspace

if TYPE_CHECKING:
    from flows.gates.judge import GateResult
    from flows.ledger import Claim
    from flows.registry.versions import ModelVersion

__all__ = ["RefusedError", "take_up"]


class RefusedError(CopalError):
    """Some dataset versions could not be adapted to; the others were."""


def _now() -> datetime:
    return datetime.now(UTC)


def take_up(
    workspace: str,
    step: Callable[[str, str, str], int | None],
    gates: Callable[[Project, ModelVersion, Claim], tuple[GateResult, ...]],
    clock: Callable[[], datetime] = _now,
) -> list[int]:
    """Take the step to the oldest pending dataset version, compare anew, and so on until nothing is pending.

    So what is committed while a step runs is taken up too. What a killed process left to do for the newest version (its
    gates, say) is done first. A dataset that is refused does not keep the others waiting: all orders of the steps end
    in the same model. Missing data is no error: the dataset version is looked for again later. What was refused before
    is not tried again with the same settings, and stays an error.

    Args:
        workspace: the folder of the workspace.
        step: (workspace, domain, commit) -> the number of the new version, None where the newest one knows the data.
        gates: runs the gates of a version, as in `flows.step.run.Tasks`.
        clock: tells the time.

    Returns:
        The numbers of the versions that were made.

    Raises:
        CopalError: a dataset was refused; says which and why. The others were adapted to.
    """
    project = open_project(workspace)
    work, settings, model = project.workspace, project.settings, project.name
    head = project.registry.head()
    if head is not None and not head.concluded:
        with hold_lineage(project, f"gates of version {head.number}") as claim:
            finish(project, claim, gates)
    made: list[int] = []
    refused: list[str] = []
    tried: set[tuple[str, str]] = set()  # without a new version: such a step must not be tried for ever
    while True:
        project.registry.refresh()  # a step is taken by another process, or with a project of its own
        found = plan(project, clock())
        _forget_old(work, model, found)
        version = next((version for version in found.pending if (version.domain, version.md5) not in tried), None)
        if version is None:
            break
        tried.add((version.domain, version.md5))
        try:
            number = step(workspace, version.domain, version.git_rev)
        except CopalError as error:
            if isinstance(error, MissingDataError) and version.md5 in str(error):  # not that of an earlier domain
                note_missing(work, model, version.domain, version.md5, settings.watch.interval, clock())
            else:
                refused.append(f"{version.path}: {error}" if version.path not in str(error) else str(error))
        else:
            if number is not None:
                made.append(number)
                tried.remove((version.domain, version.md5))  # it may come back after another version
    known = [refusal_text(*each) for each in found.refused if (each[0].domain, each[0].md5) not in tried]
    if found.problems or known or refused:
        raise RefusedError("; ".join((*found.problems, *known, *refused)))
    return made


def _forget_old(workspace: Workspace, model: str, found: Plan) -> None:
    """Forget the dataset versions that no longer wait: adapted to, or their pointer names other data or is gone."""
    wanted = {(version.domain, version.md5) for version in (*found.pending, *(version for version, _ in found.waiting))}
    for domain, entry in waiting(workspace, model).items():
        if (domain, entry.dvc_md5) not in wanted:
            forget(workspace, model, domain)
