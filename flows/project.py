"""A project: a workspace, its settings and its registry, opened once at the edge and handed on.

Everything that copal does is done to a project. What takes two of its stores at once stands here: to hold the lineage
means to finish what a dead holder had begun to publish.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.lineage.entries import Entry
from flows.registry.claims import ALIASES, Claim, claimed
from flows.registry.registry import Registry, open_registry
from flows.settings import Settings, load_settings
from flows.workspace import Workspace, open_workspace

__all__ = [
    "Project",
    "append_log",
    "complete_log",
    "hold_aliases",
    "hold_lineage",
    "open_project",
    "project_of",
    "read_log",
]

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Project:
    """A workspace with its settings, and the lineage that it grows."""

    workspace: Workspace
    settings: Settings
    registry: Registry

    @property
    def name(self) -> str:
        """Of the lineage: the registered model."""
        return self.settings.model.name


def open_project(folder: Path | str) -> Project:
    """The project in the workspace `folder`; no store is opened before it is asked for something.

    Raises:
        WorkspaceError: `folder` is no workspace.
        SettingsError: its params.yaml is bad.
    """
    workspace = open_workspace(Path(folder))
    return project_of(workspace, load_settings(workspace.params))


def project_of(workspace: Workspace, settings: Settings) -> Project:
    """The project of a workspace with these settings."""
    return Project(workspace, settings, open_registry(workspace, settings))


@contextmanager
def hold_lineage(project: Project, what: str, tell: Tell | None = None) -> Iterator[Claim]:
    """Be the only one who works on the lineage; waits as long as somebody else does."""
    with claimed(project.registry, what, lease=project.settings.run.lease, tell=tell) as claim:
        yield claim


@contextmanager
def hold_aliases(project: Project, what: str, tell: Tell | None = None) -> Iterator[Claim]:
    """Be the only one who moves aliases of the lineage. Held for moments, so that a rollback waits for no step."""
    with claimed(project.registry, what, lease=project.settings.run.lease, on=ALIASES, tell=tell) as claim:
        yield claim


def read_log(project: Project) -> list[Entry]:
    """What happened to the versions after they were made, oldest first; checked.

    Raises:
        LineageError: it was altered.
    """
    return project.registry.log()


def append_log(project: Project, kind: str, **entry: Any) -> Entry:
    """Append an entry to the log."""
    return project.registry.append_log(kind, **entry)


def complete_log(project: Project) -> None:
    """Append the entry of the head's withdrawal where it is missing. Only for who holds the lineage."""
    project.registry.complete_log()
