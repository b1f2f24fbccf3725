"""Commits of a repository, as git tells them."""

from __future__ import annotations

from pathlib import Path

from flows.data.dataset import DatasetError
from flows.data.git import reason, run_git

__all__ = [
    "find_commit",
    "git_root",
    "in_history",
    "resolve_commit",
    "unknown_revision",
]


def resolve_commit(repo: Path, rev: str) -> str:
    """Full SHA of the commit that `rev` (branch, tag, SHA, ...) names.

    Raises:
        DatasetError: `repo` is not the root of a git repository, or `rev` is unknown there.
    """
    root = git_root(repo)
    commit = find_commit(root, rev)
    if commit is None:
        raise unknown_revision(root, rev)
    return commit


def in_history(repo: Path, commit: str, rev: str) -> bool:
    """Whether `commit` is `rev` or came before it; no where the repository has no such commit."""
    return run_git(repo, "merge-base", "--is-ancestor", commit, rev).returncode == 0


def git_root(repo: Path) -> Path:
    if not repo.is_dir():
        raise DatasetError(f"{repo} is not a folder")
    found = run_git(repo, "rev-parse", "--show-toplevel")
    if found.returncode != 0:
        raise DatasetError(f"git cannot use {repo}: {reason(found)}")
    root = repo.resolve()
    if Path(found.stdout.rstrip("\n")).resolve() != root:
        raise DatasetError(f"{repo} is inside a git repository, but not its root: give {found.stdout.strip()}")
    return root


def find_commit(root: Path, rev: str) -> str | None:
    found = run_git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{rev}^{{commit}}")
    return found.stdout.strip() if found.returncode == 0 else None


def unknown_revision(root: Path, rev: str) -> DatasetError:
    return DatasetError(f"{rev!r} is not a commit, branch or tag of {root}")
