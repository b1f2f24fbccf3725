"""Clones of repositories at URLs: made, brought up to date, and never without a commit that they once had."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path

from copal.files import write_atomic
from flows.data.commits import find_commit, watched_revision
from flows.data.dataset import DatasetError
from flows.data.git import git, login_environment, reason, run_git
from flows.uris import split_login, without_secrets

__all__ = ["check_repository", "clone_name", "is_url", "mirror"]

_SCHEMES = ("https", "http", "ssh", "git", "file")
_MADE = "copal-clone"  # a file in .git: the clone is set up
_REMOTE_HEAD = "refs/copal/head"  # in a clone; git knows no other place for a HEAD without a branch


def is_url(repository: str | None) -> bool:
    """Whether a repository is at a URL, and not at a path."""
    return repository is not None and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|[\w.-]+@[\w.-]+:", repository) is not None


def clone_name(url: str) -> str:
    """The name of the folder of a clone. A new password does not make a URL another repository."""
    return hashlib.sha256(without_secrets(url).encode()).hexdigest()[:16]


def check_repository(repository: str) -> None:
    """Check that git would take a repository for a place, and not for an option, a command or several lines.

    Raises:
        DatasetError: it would.
    """
    shown = without_secrets(repository)
    if not repository.isprintable():
        raise DatasetError(f"{shown!r} names no repository: it has a line break or another control character")
    helper = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)::", repository)
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", repository)
    if repository.startswith("-") or helper or (scheme and scheme[1].lower() not in _SCHEMES):
        raise DatasetError(f"{shown} names no repository: give a path, or a URL with {', '.join(_SCHEMES)}")


def mirror(root: Path, url: str, branch: str | None) -> None:
    """Bring the clone `root` up to date, or make it. What was killed in here, the next call completes.

    It has the remote's branches and tags under their own names, and HEAD at `branch` (without one at the remote's
    HEAD): so a revision means in a clone what it means in another repository. It loses no commit when the remote's
    history is rewritten. Only for who holds the clone's lock.

    Raises:
        DatasetError: the remote does not answer, or has no such branch.
        GitError: git refuses.
    """
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
