"""The git command line: the only place that runs it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from copal.errors import CopalError
from flows.uris import Login

__all__ = ["GitError", "commit", "git", "login_environment", "reason", "run_git", "start_git"]

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


def run_git(
    root: Path,
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    protocols: Sequence[str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run git in the folder `root`, whatever its exit status. What is not UTF-8 comes as surrogates, as in file names.

    Args:
        environment: variables beside those of this process.
        protocols: the only ones that git may use, whatever the user's settings allow (`ext` runs a command).

    Raises:
        GitError: git is not installed.
    """
    if protocols is not None:
        environment = {**(environment or {}), "GIT_ALLOW_PROTOCOL": ":".join(protocols)}
    with start_git(root, *arguments, environment=environment) as process:
        out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, os.fsdecode(out), os.fsdecode(err))


def login_environment(url: str, login: Login | None) -> dict[str, str]:
    """The variables with which git logs in at the host of `url`, and nowhere else.

    In the URL, every user of the machine could read the login: git hands it on to another process, on a command line.
    """
    if login is None:
        return {}
    user, password = login
    says = [f'printf "{name}=%s\\n" "$COPAL_GIT_{name.upper()}"' for name in ("username", "password")]
    told = says if password is not None else says[:1]
    helper = f'!f() {{ test "$1" = get && {" && ".join(told)}; }}; f'
    # An empty helper ends the list of those that the user has set: with a password they are not asked, and keep none.
    helpers = [helper] if password is None else ["", helper]
    host, taken = urlsplit(url), int(os.environ.get("GIT_CONFIG_COUNT") or 0)
    found = {"COPAL_GIT_USERNAME": user, "COPAL_GIT_PASSWORD": password or ""}
    found["GIT_CONFIG_COUNT"] = str(taken + len(helpers))
    for place, value in enumerate(helpers, taken):
        found[f"GIT_CONFIG_KEY_{place}"] = f"credential.{host.scheme}://{host.netloc}.helper"
        found[f"GIT_CONFIG_VALUE_{place}"] = value
    return found


def start_git(root: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start git in the folder `root`, with pipes: for `cat-file --batch`, which answers as long as it is asked.

    Raises:
        GitError: git is not installed.
    """
    # PYTHONSAFEPATH is meant for copal's own processes: a user's git hooks import what they like.
    inherited = {name: value for name, value in os.environ.items() if name not in (*_HOOK, "PYTHONSAFEPATH")}
    try:
        return subprocess.Popen(
            ["git", "-c", "core.fsmonitor=false", *arguments],  # it would be a command of the repository's
            cwd=root,
            env=inherited | {"LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0"} | dict(environment or {}),
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
