"""What `copal gc` deletes: what can be made again (running sums of old versions), and what killed runs left behind."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from copal.files import freed_bytes
from flows.data.fetch import scratch_folders
from flows.project import Project, hold_lineage
from flows.step.staging import TASK, folders_of_nodes, run_folders
from flows.workspace import Workspace, exclusive

__all__ = ["Freed", "collect"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Freed:
    """Something that was deleted, and the bytes it took."""

    what: str
    size: int


def collect(project: Project, *, dry_run: bool = False) -> list[Freed]:
    """Delete the running sum of every version but the head, run folders that no run will go on with, here and of nodes
    that do not live (`copal node`), and what killed registrations left in the registry; waits for a step that runs.
    What a version refers to is never deleted.

    A step needs the head's sum only. After a version was withdrawn the new head's may be gone: the next step makes it
    again from the contributions.

    Args:
        dry_run: only say what would go.

    Raises:
        RegistryError: the registry cannot be read, or its artifact store does not let sums be deleted.
    """
    workspace, registry = project.workspace, project.registry
    found: list[Freed] = []
    head = registry.head()
    if head is None:
        return found
    with exclusive(workspace), hold_lineage(project, "collect garbage"):
        for version in registry.versions()[:-1]:
            size = registry.drop_sum(version, dry_run=dry_run)
            if size:
                found.append(Freed(what=f"running sum of version {version.number}", size=size))
        runs = run_folders(project).items()
        useless = [folder for folder, built_on in runs if built_on != head.number]  # in the others a version may wait
        for folder in (*useless, *scratch_folders(workspace.cache)):
            found.append(_freed(workspace, folder, dry_run))
        for folder, built_on in folders_of_nodes(project):
            left = folder if built_on != head.number else folder / TASK  # no node goes on with a task
            if left.exists():
                found.append(_freed(workspace, left, dry_run))
        if not dry_run:
            registry.sweep()
    return found


def _freed(workspace: Workspace, folder: Path, dry_run: bool) -> Freed:
    found = Freed(what=str(folder.relative_to(workspace.root)), size=freed_bytes(folder))
    if not dry_run:
        shutil.rmtree(folder)
    return found
