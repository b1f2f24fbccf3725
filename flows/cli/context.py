"""What commands share: the workspace that they open, and the parameters that several of them take."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from copal.errors import CopalError

if TYPE_CHECKING:
    from flows.project import Project

__all__ = ["CommandError", "Folder", "Json", "Version", "open_project"]

Folder = Annotated[
    str, Parameter(name="--workspace", env_var="COPAL_WORKSPACE", help="The workspace: a folder, or URL#REVISION.")
]
Version = Annotated[str, Parameter(help="A number, or an alias such as latest.")]
Json = Annotated[bool, Parameter(name="--json", help="For programs.")]


class CommandError(CopalError):
    """The command line asks for what cannot be done as things are."""


def open_project(folder: str) -> Project:
    """The project in the workspace `folder`: what a command is done to. No store is opened yet.

    Raises:
        WorkspaceError: `folder` is none.
        SettingsError: its params.yaml is wrong.
    """
    from flows import project  # brings a database toolkit, which help can do without

    found = project.open_project(folder)
    url = os.environ.get("PREFECT_API_URL")
    if url and "PREFECT_API_AUTH_STRING" not in os.environ:
        from flows.stack.access import access_of

        access = access_of(found.workspace, url)
        if access is not None:  # the server is the workspace's own: Prefect, which reads this, need not be told by hand
            os.environ["PREFECT_API_AUTH_STRING"] = access.auth_string
    return found
