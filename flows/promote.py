"""The flows `promote` and `rollback`: like the commands, for people who have Prefect's UI and no shell."""

from __future__ import annotations

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from flows.gates.champion import make_champion, named, restore_champion
from flows.lineage.entries import Entry
from flows.project import Project, open_project
from flows.runs.artifacts import artifact_key
from flows.runs.events import tell_champion
from flows.runs.log import tell
from flows.runs.names import promote_run, rollback_run

__all__ = ["promote", "rollback"]


@flow(name="promote", flow_run_name=promote_run, result_serializer="json")
def promote(workspace: str, version: str, why: str | None = None, force: bool = False) -> int | None:
    """Make a version the champion: see `flows.gates.champion.make_champion`.

    Args:
        workspace: the folder of the workspace.
        version: a number, or an alias such as challenger.
        why: the reason, for the log. The log names the user of the worker, so say here who wants it.
        force: promote it even if its gates failed, or the alias was moved by hand; needs a reason.

    Returns:
        The number of the log entry; None where the version is the champion already.

    Raises:
        CopalError: it may not be promoted, or there is none; nothing changed.
    """
    project = open_project(workspace)
    number = project.registry.resolve(version).number
    entry = make_champion(project, number, why=why, force=force, tell=tell)
    return None if entry is None else _show(project, entry)


@flow(name="rollback", flow_run_name=rollback_run, result_serializer="json")
def rollback(workspace: str, why: str | None = None, force: bool = False) -> int:
    """Make the champion before this one the champion again: see `flows.gates.champion.restore_champion`.

    Args:
        workspace, why, force: see `promote`.

    Returns:
        The number of the log entry.

    Raises:
        CopalError: there was no champion before; nothing changed.
    """
    project = open_project(workspace)
    return _show(project, restore_champion(project, why=why, force=force, tell=tell))


def _show(project: Project, entry: Entry) -> int:
    create_markdown_artifact(
        key=artifact_key(project.name, "champion"),
        markdown=f"{entry.kind} of {project.name} from {named(entry.from_version)} to "
        f"{named(entry.to_version)}: {entry.why or 'no reason given'} (log entry {entry.number})",
        description=f"champion of {project.name}: {named(entry.to_version)}",
    )
    tell_champion(project.name, entry.to_version, entry.why)
    return entry.number
