"""A workspace that is named by a URL: cloned on this machine, so that hosts share no folder."""

from __future__ import annotations

import os
from pathlib import Path

from copal.files import locked
from flows.data.clones import check_repository, clone_name, is_url, mirror
from flows.data.git import git
from flows.uris import has_secrets, without_secrets
from flows.workspace import WorkspaceError

__all__ = ["workspace_folder"]


def workspace_folder(named: str) -> Path:
    """The folder of a workspace: `named` itself, or a clone of the URL that it is, brought up to date.

    `https://git.example/team.git#main` is the revision `main` of that repository, a branch, a tag or a commit; without
    one it is the remote's HEAD. The clone lies in `workspaces` of `COPAL_HOME` (else of `copal` in `XDG_CACHE_HOME`,
    else `~/.cache/copal`), for one URL and revision in one place: what runs left in its `.copal` the next one finds.

    Raises:
        WorkspaceError: the URL holds a password, which flow runs would show.
        DatasetError: the remote does not answer, or has no such revision; or the URL is none that copal asks.
        GitError: git refuses.
    """
    if not is_url(named):
        return Path(named)
    if has_secrets(named):
        raise WorkspaceError(
            f"{without_secrets(named)} names the workspace with a password in it, which others would see: leave it "
            "out, and give it to git (a credential helper, or ~/.netrc)"
        )
    url, _, revision = named.partition("#")
    check_repository(url)
    folder = _home() / "workspaces" / clone_name(named)
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with locked(folder.with_name(f"{folder.name}.lock")):
        mirror(folder, url, revision or None)
        git(folder, "config", "core.symlinks", "false")  # none leads out of it
        git(folder, "reset", "--quiet", "--hard", "HEAD")  # what git does not track stays: .copal
    return folder


def _home() -> Path:
    named = os.environ.get("COPAL_HOME")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "copal"
