"""What commands share: the workspace that they open, and the parameters that several of them take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from copal.errors import CopalError
from flows.settings import Settings, Workspace, load_settings, open_workspace

if TYPE_CHECKING:
    from flows.registry import Registry

__all__ = ["CommandError", "Folder", "Json", "Project", "Version", "open_project", "open_settings"]

Folder = Annotated[Path, Parameter(name="--workspace", env_var="COPAL_WORKSPACE", help="The workspace.")]
Version = Annotated[str, Parameter(help="A number, or an alias such as latest.")]
Json = Annotated[bool, Parameter(name="--json", help="For programs.")]


class CommandError(CopalError):
    """The command line asks for what cannot be done as things are."""


@dataclass(frozen=True, slots=True)
class Project:
    """A workspace that is open: its folder, its settings and its registry of versions."""

    workspace: Workspace
    settings: Settings
    registry: Registry


def open_project(folder: Path) -> Project:
    """Open the workspace in `folder`.

    Raises:
        WorkspaceError: `folder` is none.
        SettingsError: its params.yaml is wrong.
        RegistryError: its registry cannot be opened.
    """
    from flows.registry import open_registry

    workspace, settings = open_settings(folder)
    return Project(workspace, settings, open_registry(workspace, settings))


def open_settings(folder: Path) -> tuple[Workspace, Settings]:
    """The workspace in `folder` without its registry, for a command that must be quick or work where that is down.

    Raises:
        WorkspaceError: `folder` is none.
        SettingsError: its params.yaml is wrong.
    """
    workspace = open_workspace(folder)
    return workspace, load_settings(workspace.params)
