"""Git hooks that notify the Prefect server of new dataset versions: marked blocks in post-commit and post-merge."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

from copal.errors import CopalError
from copal.files import write_atomic
from flows.data.git import git
from flows.project import Project
from flows.workspace import Workspace

__all__ = ["HookError", "install", "uninstall"]

_BEGIN, _END = "# >>> copal >>>", "# <<< copal <<<"
_BLOCK = re.compile(rf"{_BEGIN}\n.*?{_END}\n", re.DOTALL)
_SHELL = re.compile(r"#!\s*(?:/\S*/)?(?:env\s+)?(?:/\S*/)?(?:ba|da|k|z|)sh\b")
# hook -> the commit before the change; an empty text where there is none (a first commit).
_BEFORE = {"post-commit": "HEAD~1", "post-merge": "ORIG_HEAD"}


class HookError(CopalError):
    """A hook is there that copal cannot add to."""


def install(project: Project) -> list[Path]:
    """Add copal's block to the hooks of the repository that holds the data, or bring it up to date.

    What else a hook says stays.

    Returns:
        The hooks.

    Raises:
        HookError: a hook is there that is no shell script in UTF-8, or that git does not run; or the data is at a URL.
            Nothing was changed.
        GitError: git refuses.
    """
    texts = {}
    root = _data_repository(project)
    for name, before in _BEFORE.items():
        path = _hook(root, name)
        text = "#!/bin/sh\n"
        if path.exists():
            text = _read(path)
            _check(path, text)
        # At the top: a hook may end with exit or exec.
        first, _, rest = _BLOCK.sub("", text).partition("\n")
        texts[path] = f"{first}\n{_block(project.workspace, before)}{rest}"
    for path, text in texts.items():
        if not path.exists() or _read(path) != text:
            _write(path, text)
    return list(texts)


def uninstall(project: Project) -> list[Path]:
    """Remove copal's block from the hooks, and a hook in which nothing else is left.

    Returns:
        The hooks that had one.

    Raises:
        HookError: a hook is not UTF-8.
        GitError: git refuses.
    """
    found = []
    root = _data_repository(project)
    for name in _BEFORE:
        path = _hook(root, name)
        text = _read(path) if path.is_file() else ""
        if not _BLOCK.search(text):
            continue
        found.append(path)
        rest = _BLOCK.sub("", text)
        if rest == "#!/bin/sh\n":
            path.unlink()
        else:
            _write(path, rest)
    return found


def _data_repository(project: Project) -> Path:
    from flows.data.clones import is_url
    from flows.data.repositories import data_root

    if is_url(project.settings.watch.repository):
        raise HookError(
            "the data is in another repository, at a URL: let its own hooks or its CI call `copal notify DOMAIN`, "
            "or the schedule find it"
        )
    return data_root(project.workspace, project.settings.watch)


def _hook(root: Path, name: str) -> Path:
    """Where git looks for the hook (core.hooksPath counts), through links: what they point to is what is written."""
    return (root / git(root, "rev-parse", "--git-path", f"hooks/{name}").rstrip("\n")).resolve()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise HookError(f"{path} is not UTF-8: call `copal notify` from it yourself") from error


def _check(path: Path, text: str) -> None:
    if not _SHELL.match(text):
        raise HookError(f"{path} is no shell script: call `copal notify` from it yourself")
    if not os.access(path, os.X_OK):
        raise HookError(f"{path} is not executable, git does not run it: remove it, or run `chmod +x {path}`")


def _block(workspace: Workspace, before: str) -> str:
    # In the background and silent: a commit neither waits nor fails. -P: not what lies in the repository is imported.
    # Git's variables are for the hook; Python's libraries would take them for the user's.
    python, folder = shlex.quote(sys.executable), shlex.quote(str(workspace.root))
    command = f'{python} -P -m flows.cli notify --workspace {folder} --since "$before"'
    return f"""\
{_BEGIN}
# Tells copal's watcher of new dataset versions; `copal hook uninstall` removes this.
(
  before=$(git rev-parse --quiet --verify {before})
  unset $(git rev-parse --local-env-vars)
  {command} </dev/null >/dev/null 2>&1 &
) >/dev/null 2>&1
{_END}
"""


def _write(path: Path, text: str) -> None:
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o755
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text)
    path.chmod(mode)
