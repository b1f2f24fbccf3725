"""The repository of the data: the workspace, another folder, or a clone of a URL."""

from __future__ import annotations

from pathlib import Path

from copal.files import locked
from flows.data.clones import check_repository, clone_name, is_url, mirror
from flows.data.commits import find_commit, is_bare
from flows.settings import WatchSettings
from flows.workspace import Workspace, make_private

__all__ = [
    "data_root",
    "has_commit",
    "place_of",
]


def data_root(workspace: Workspace, watch: WatchSettings, commit: str | None = None) -> Path:
    """The repository whose domains count: the workspace, or the one that `watch.repository` names.

    A path is read where it is. A URL has a clone in the workspace's cache, which has the remote's branches and tags
    under their own names, and HEAD at the watched branch (without one at the remote's HEAD): so a revision means in a
    clone what it means in the other two. It has no work tree: what is foreign is only ever read out of git. The clone
    is fetched each time, unless it has `commit`, and loses no commit when the remote's history is rewritten.

    Args:
        commit: full SHA of the only commit that is wanted.

    Raises:
        DatasetError: the remote does not answer, or has no such branch; or the URL is none that copal asks.
        GitError: git refuses.
    """
    root = place_of(workspace, watch.repository)
    if watch.repository is None:
        return root
    check_repository(watch.repository)
    if not is_url(watch.repository) or (commit and has_commit(root, commit)):
        return root
    make_private(workspace, root.parent)
    with locked(root.with_name(f"{root.name}.lock")):
        mirror(root, watch.repository, watch.branch)
    return root


def place_of(workspace: Workspace, repository: str | None) -> Path:
    """The folder of a repository, which need not be there. A new password does not make a URL another repository."""
    if repository is None:
        return workspace.root
    if not is_url(repository):
        return workspace.root / Path(repository).expanduser()
    return workspace.cache / "repositories" / clone_name(repository)


def has_commit(root: Path, commit: str) -> bool:
    # Not a repository around this one: that has another commit of the same domain, perhaps.
    there = (root / ".git").exists() or (root.is_dir() and is_bare(root))
    return there and find_commit(root, commit) == commit
