"""Frees what can be made again or what nobody needs: running sums of old versions, and what killed runs left."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flows.settings import Workspace
from flows.stages import exclusive

if TYPE_CHECKING:
    from flows.registry import Registry

__all__ = ["Freed", "collect"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Freed:
    """Something that was deleted, and the bytes it took."""

    what: str
    size: int


def collect(workspace: Workspace, registry: Registry, *, dry_run: bool = False) -> list[Freed]:
    """Delete the running sum of every version but the head, and the run folders; waits for a step that runs.

    A step needs the head's sum only. After a version was withdrawn the new head's may be gone: the next step makes it
    again from the contributions, which are never deleted here.

    Args:
        dry_run: only say what would go.

    Raises:
        RegistryError: the registry cannot be read, or its artifact store does not let sums be deleted.
    """
    found = []
    with exclusive(workspace):  # whoever uses a run folder holds the lock
        for version in registry.versions()[:-1]:
            size = registry.drop_sum(version, dry_run=dry_run)
            if size:
                found.append(Freed(what=f"running sum of version {version.number}", size=size))
        for folder in sorted(path for path in workspace.runs.glob("*") if path.is_dir()):
            found.append(Freed(what=str(folder.relative_to(workspace.root)), size=_size(folder)))
            if not dry_run:
                shutil.rmtree(folder)
    return found


def _size(folder: Path) -> int:
    """Bytes below `folder` that deleting it frees: a file with a second name elsewhere stays."""
    stats = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return sum(stat.st_size for stat in stats if stat.st_nlink == 1)
