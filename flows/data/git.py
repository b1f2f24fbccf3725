"""The git command line: the only place that runs it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from copal.errors import CopalError

__all__ = ["GitError", "commit", "git", "reason", "run_git", "start_git"]

# In a git hook these point to the repository of the hook.
_HOOK = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_OBJECT_DIRECTORY", "GIT_COMMON_DIR")


class GitError(CopalError):
    """Git is not there, or refuses."""


def git(root: Path, command: str, *arguments: str, options: Sequence[str] = ()) -> str:
    """What `git OPTIONS COMMAND ARGUMENTS` in the folder `root` prints.

    Raises:
        GitError: git is not installed, or refuses.
    """
    done = run_git(root, *options, command, *arguments)
    if done.returncode != 0:
        raise GitError(f"git {command} failed in {root}: {reason(done)}")
    return done.stdout


def reason(done: subprocess.CompletedProcess[str]) -> str:
    """Why git refused: the first line of what it says."""
    lines = (done.stderr or done.stdout).splitlines()
    return next((line for line in lines if line.strip()), "no reason given")


def run_git(root: Path, *arguments: str, protocols: Sequence[str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run git in the folder `root`, whatever its exit status. What is not UTF-8 comes as surrogates, as in file names.

    Args:
        protocols: the only ones that git may use, whatever the user's settings allow (`ext` runs a command).

    Raises:
        GitError: git is not installed.
    """
    with start_git(root, *arguments, protocols=protocols) as process:
        out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, os.fsdecode(out), os.fsdecode(err))


def start_git(root: Path, *arguments: str, protocols: Sequence[str] | None = None) -> subprocess.Popen[bytes]:
    """Start git in the folder `root`, with pipes: for `cat-file --batch`, which answers as long as it is asked.

    Raises:
        GitError: git is not installed.
    """
    # PYTHONSAFEPATH is meant for copal's own processes: a user's git hooks import what they like.
    environment = {name: value for name, value in os.environ.items() if name not in (*_HOOK, "PYTHONSAFEPATH")}
    if protocols is not None:
        environment["GIT_ALLOW_PROTOCOL"] = ":".join(protocols)
    try:
        return subprocess.Popen(
            ["git", "-c", "core.fsmonitor=false", *arguments],  # it would be a command of the repository's
            cwd=root,
            env=environment | {"LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    except FileNotFoundError as error:
        raise GitError("git is not installed, or not on PATH: install it") from error


def commit(root: Path, message: str, paths: Sequence[str] | None = None) -> None:
    """Commit what is staged; with `paths`, these files only, and what else is staged stays staged.

    Makes no commit where nothing is staged. Where git knows no identity the author is `copal <copal@localhost>`.

    Raises:
        GitError: git is not installed, or refuses.
    """
    only = () if paths is None else ("--", *paths)
    if not git(root, "diff", "--cached", "--name-only", *only):
        return
    identity: list[str] = []
    for key, value in (("user.name", "copal"), ("user.email", "copal@localhost")):
        if run_git(root, "config", key).returncode != 0:
            identity += ["-c", f"{key}={value}"]
    git(root, "commit", "--quiet", "--message", message, *(("--only", *only) if only else ()), options=identity)
