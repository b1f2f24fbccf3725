"""Commits of a repository, as git tells them."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from flows.data.dataset import DatasetError
from flows.data.git import git, reason, run_git

__all__ = [
    "committed_at",
    "find_commit",
    "git_root",
    "in_history",
    "resolve_commit",
    "unknown_revision",
    "watched_revision",
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


def committed_at(repo: Path, commit: str) -> datetime:
    """When a commit was made, in UTC.

    Raises:
        GitError: the repository has no such commit.
    """
    return datetime.fromtimestamp(int(git(repo, "show", "--no-patch", "--format=%ct", commit, "--")), UTC)


def in_history(repo: Path, commit: str, rev: str) -> bool:
    """Whether `commit` is `rev` or came before it; no where the repository has no such commit."""
    return run_git(repo, "merge-base", "--is-ancestor", commit, rev).returncode == 0


def git_root(repo: Path) -> Path:
    if not repo.is_dir():
        raise DatasetError(f"{repo} is not a folder")
    root = repo.resolve()
    if is_bare(root):
        return root
    found = run_git(repo, "rev-parse", "--show-toplevel")
    if found.returncode != 0:
        raise DatasetError(f"git cannot use {repo}: {reason(found)}")
    if Path(found.stdout.rstrip("\n")).resolve() != root:
        raise DatasetError(f"{repo} is inside a git repository, but not its root: give {found.stdout.strip()}")
    return root


def is_bare(root: Path) -> bool:
    """Whether a folder is itself a repository without a work tree."""
    found = run_git(root, "rev-parse", "--is-bare-repository", "--absolute-git-dir")
    said, _, folder = found.stdout.rstrip("\n").partition("\n")
    return said == "true" and Path(folder).resolve() == root.resolve()


def watched_revision(root: Path, branch: str | None) -> str:
    """What names the watched branch, where a tag may have the same name; HEAD where none is named.

    What is no branch here is taken as it is: a branch of a remote (`origin/main`), say.
    """
    if branch is None:
        return "HEAD"
    full = f"refs/heads/{branch}"
    return branch if find_commit(root, full) is None else full


def find_commit(root: Path, rev: str) -> str | None:
    found = run_git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{rev}^{{commit}}")
    return found.stdout.strip() if found.returncode == 0 else None


def unknown_revision(root: Path, rev: str) -> DatasetError:
    return DatasetError(f"{rev!r} is not a commit, branch or tag of {root}")
