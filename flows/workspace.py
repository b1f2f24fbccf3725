"""The places of a workspace: any git + DVC repository with `params.yaml` and `data/`.

What copal writes there lies in `.copal/`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from copal.errors import CopalError
from copal.files import locked
from flows.settings import Settings
from flows.uris import is_server, local_path

__all__ = [
    "Workspace",
    "WorkspaceError",
    "exclusive",
    "make_private",
    "open_workspace",
]


class WorkspaceError(CopalError):
    """A folder is not a workspace."""


@dataclass(frozen=True, slots=True)
class Workspace:
    """The places of a workspace. `root` is absolute (`open_workspace` sees to it)."""

    root: Path

    @property
    def params(self) -> Path:
        """The settings."""
        return self.root / "params.yaml"

    @property
    def data(self) -> Path:
        """The domains, tracked by DVC. Flows never write here."""
        return self.root / "data"

    @property
    def private(self) -> Path:
        """All that copal writes; ignored by git. Only its owner may look into it."""
        return self.root / ".copal"

    @property
    def artifacts(self) -> Path:
        """Models and states of the registry in the workspace."""
        return self.private / "artifacts"

    @property
    def runs(self) -> Path:
        """What a run has not published yet."""
        return self.private / "runs"

    @property
    def nodes(self) -> Path:
        """What the nodes of steps of several machines have finished here (`copal node`), by number."""
        return self.private / "nodes"

    @property
    def cache(self) -> Path:
        """Fetched dataset versions, and clones. A clone may be the only place of commits that its remote dropped."""
        return self.private / "cache"

    @property
    def lock(self) -> Path:
        """The file that `exclusive` locks."""
        return self.private / "lock"

    def path(self, text: str | None) -> Path | None:
        """A path of the settings: relative ones begin at the workspace."""
        return None if text is None else self.root / Path(text).expanduser()

    def registry_uri(self, settings: Settings) -> str:
        """The MLflow tracking URI: the one that is set, else SQLite in the workspace."""
        return self._here(settings.registry.uri or f"sqlite:///{self.private / 'mlflow.db'}")

    def artifact_root(self, settings: Settings) -> Path:
        """The folder of this machine in which copal may write and delete artifacts."""
        named = settings.registry.artifacts
        local = None if named is None else local_path(named)
        return self.artifacts if local is None else self.root / local.expanduser()

    def artifact_location(self, settings: Settings) -> str | None:
        """The URI under which the artifacts of a new lineage go; None: where the MLflow server says."""
        named = settings.registry.artifacts
        if named is not None and local_path(named) is None:
            return named
        if named is None and is_server(settings.registry.uri):
            return None
        return self.artifact_root(settings).resolve().as_uri()

    def ledger_uri(self, settings: Settings) -> str:
        """The SQLAlchemy URL of claims and log: the one that is set, else SQLite in the workspace.

        It may hold a password: show it `without_secrets`.
        """
        return self._here(settings.ledger.uri or f"sqlite:///{self.private / 'ledger.db'}")

    def _here(self, uri: str) -> str:
        # A relative path begins at the workspace: from the folder of each command there would be many databases.
        relative = re.fullmatch(r"(sqlite(?:\+\w+)?:///)([^/].*)", uri)
        return f"{relative[1]}{self.root / relative[2]}" if relative else uri


def open_workspace(path: Path) -> Workspace:
    """The workspace at `path`.

    Raises:
        WorkspaceError: no such folder, or not the root of a git + DVC repository with a params.yaml; or `.copal`, or
            something right in it, is a link that leads out of it.
    """
    root = path.expanduser().resolve()
    if not root.is_dir():
        raise WorkspaceError(f"{path} is not a folder: run `copal init {path}` to make a workspace")
    # In a linked work tree and in a submodule .git is a file.
    for name, lacks in (
        (".git", "is not the root of a git repository"),
        (".dvc", "has no .dvc folder"),
        ("params.yaml", "has no params.yaml"),
    ):
        if not (root / name).exists():
            raise WorkspaceError(f"{root} {lacks}: run `copal init {path}` to make it a workspace")
    workspace = Workspace(root)
    _check_links(workspace)
    _close_to_others(workspace.private)  # of a copal that left it open, or copied
    return workspace


def _check_links(workspace: Workspace) -> None:
    """A copy of a workspace has the same links, and would write to and delete from what is the original's."""
    private = workspace.private
    for place in (private, *(private.iterdir() if private.is_dir() else ())):
        if place.is_symlink() and not place.resolve().is_relative_to(workspace.root):
            raise WorkspaceError(
                f"{place} is a link that leads out of the workspace, to {place.resolve()}: copal writes and deletes "
                "nothing outside; put that in its place, and for more room move the whole workspace"
            )


def make_private(workspace: Workspace, folder: Path | None = None) -> Path:
    """Make `.copal` where it is missing, closed to all but its owner, and `folder` in it.

    Models, logs and the credentials of `copal up` lie there.

    Returns:
        `folder`, else `.copal`.
    """
    workspace.private.mkdir(mode=0o700, parents=True, exist_ok=True)
    _close_to_others(workspace.private)
    if folder is None:
        return workspace.private
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _close_to_others(folder: Path) -> None:
    """Take from group and others what they may do with a folder of this user's."""
    with suppress(OSError):  # it is not there, or the file system cannot be written to
        found = folder.stat()
        if found.st_uid == os.geteuid() and found.st_mode & 0o077:
            folder.chmod(0o700)


@contextmanager
def exclusive(workspace: Workspace) -> Iterator[None]:
    """Hold the workspace's lock: what sets a workspace up and what clears it run alone.

    Steps do not need it: who works on a lineage is a matter of claims. The system frees it when the process dies.
    """
    make_private(workspace)
    with locked(workspace.lock):
        yield
