"""The repository of the data: the workspace, another folder, or a clone of a URL."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path

from copal.files import locked, write_atomic
from flows.data.commits import find_commit, is_bare, watched_revision
from flows.data.dataset import DatasetError
from flows.data.git import git, login_environment, reason, run_git
from flows.settings import WatchSettings
from flows.uris import split_login, without_secrets
from flows.workspace import Workspace, make_private

__all__ = [
    "data_root",
    "has_commit",
    "is_url",
    "place_of",
]


_SCHEMES = ("https", "http", "ssh", "git", "file")
_MADE = "copal-clone"  # a file in .git: the clone is set up
_REMOTE_HEAD = "refs/copal/head"  # in a clone; git knows no other place for a HEAD without a branch


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
    _check(watch.repository)
    if watch.repository is None or not is_url(watch.repository) or (commit and has_commit(root, commit)):
        return root
    make_private(workspace, root.parent)
    with locked(root.with_name(f"{root.name}.lock")):
        _mirror(root, watch.repository, watch.branch)
    return root


def place_of(workspace: Workspace, repository: str | None) -> Path:
    """The folder of a repository, which need not be there. A new password does not make a URL another repository."""
    if repository is None:
        return workspace.root
    if not is_url(repository):
        return workspace.root / Path(repository).expanduser()
    digest = hashlib.sha256(without_secrets(repository).encode()).hexdigest()
    return workspace.cache / "repositories" / digest[:16]


def is_url(repository: str | None) -> bool:
    """Whether a repository is at a URL, and not at a path."""
    return repository is not None and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|[\w.-]+@[\w.-]+:", repository) is not None


def _check(repository: str | None) -> None:
    """Check that git would take a repository for a place, and not for an option, a command or several lines."""
    if repository is None:
        return
    shown = without_secrets(repository)
    if not repository.isprintable():
        raise DatasetError(f"{shown!r} names no repository: it has a line break or another control character")
    helper = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)::", repository)
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", repository)
    if repository.startswith("-") or helper or (scheme and scheme[1].lower() not in _SCHEMES):
        raise DatasetError(f"{shown} names no repository: give a path, or a URL with {', '.join(_SCHEMES)}")


def has_commit(root: Path, commit: str) -> bool:
    # Not a repository around this one: that has another commit of the same domain, perhaps.
    there = (root / ".git").exists() or (root.is_dir() and is_bare(root))
    return there and find_commit(root, commit) == commit


def _mirror(root: Path, url: str, branch: str | None) -> None:
    """Bring the clone `root` up to date, or make it. What was killed in here, the next call completes."""
    shown = without_secrets(url)
    if not (root / ".git" / _MADE).exists():
        root.mkdir(exist_ok=True)
        git(root, "init", "--quiet", "--template=")
        git(root, "config", "gc.pruneExpire", "never")  # a lineage may be made of commits that the remote dropped
        git(root, "config", "remote.origin.url", shown)
        _remove_work_tree(root)
        write_atomic(root / ".git" / _MADE, "")
    wanted = ["+refs/heads/*:refs/heads/*", "+refs/tags/*:refs/tags/*"]
    if branch is None:
        wanted.append(f"+HEAD:{_REMOTE_HEAD}")
    patience = ("-c", "http.lowSpeedLimit=1", "-c", "http.lowSpeedTime=60")  # of a remote that says nothing
    options = (
        "--quiet",
        "--prune",
        "--update-head-ok",
        "--no-write-fetch-head",
        "--no-recurse-submodules",
        "--update-shallow",
    )
    bare, login = split_login(url)
    login_of = login_environment(bare, login)
    fetch = (*patience, "fetch", *options, "--", bare, *wanted)
    done = run_git(root, *fetch, environment=login_of, protocols=_SCHEMES)
    if done.returncode != 0:
        raise DatasetError(f"cannot fetch {shown}: {without_secrets(reason(done))}")
    tip = find_commit(root, watched_revision(root, branch) if branch else _REMOTE_HEAD)
    if tip is None:
        raise DatasetError(f"{shown} has no branch {branch!r}: mend watch.branch")
    git(root, "update-ref", "--no-deref", "HEAD", tip)


def _remove_work_tree(root: Path) -> None:
    """Clones of an earlier copal had DVC's settings in one."""
    for path in root.iterdir():
        if path.is_dir() and not path.is_symlink():
            if path.name != ".git":
                shutil.rmtree(path)
        else:
            path.unlink()
