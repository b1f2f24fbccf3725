"""DVC: opening a repository at a commit, and the few calls that change one. Errors of DVC become one line.

DVC takes a second to import, so it is imported inside the functions that need it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from copal.errors import one_line
from copal.files import write_atomic
from flows.data.commits import git_root, resolve_commit
from flows.data.dataset import DatasetError
from flows.data.git import commit as git_commit
from flows.data.git import git
from flows.data.storage import check_links, remotes_of, storage_of

__all__ = [
    "SET_UP",
    "add_and_commit",
    "dvc_errors",
    "init_repository",
    "open_dvc",
    "open_pointers",
]

SET_UP = (".gitignore", ".dvcignore", ".dvc/config", ".dvc/.gitignore")  # what `init_repository` may write


def init_repository(root: Path) -> None:
    """Make `root` a git + DVC repository that ignores `.copal/`. What is there already stays; commits nothing, stages
    what it wrote.

    Raises:
        GitError: git refuses.
        DatasetError: DVC refuses, or git tracks a link in `.dvc`.
    """
    root.mkdir(parents=True, exist_ok=True)
    if not (root / ".git").exists():
        git(root, "init", "--quiet", "--initial-branch=main")
    check_links(root)
    with dvc_errors(f"DVC cannot set up {root}"):
        from dvc.repo import Repo

        dvc = Repo(str(root)) if (root / ".dvc").is_dir() else Repo.init(str(root))
        with dvc:
            if dvc.config["core"].get("analytics", True):
                with dvc.config.edit("repo") as config:
                    config["core"]["analytics"] = False
    ignored = root / ".gitignore"
    lines = ignored.read_text(encoding="utf-8").splitlines() if ignored.exists() else []
    if ".copal/" not in lines:
        write_atomic(ignored, "\n".join([*lines, ".copal/", ""]))
    _stage(root, *SET_UP)


def add_and_commit(root: Path, domain: str, message: str) -> str:
    """`dvc add data/<domain>` and commit its pointer; the SHA of HEAD afterwards. What else is staged stays staged, but
    for what DVC needs in a repository that has never had a commit of it.

    Makes no commit where nothing changed. Where git knows no identity the author is `copal <copal@localhost>`.

    Raises:
        GitError: git refuses.
        DatasetError: `root` is not the root of a git repository, DVC refuses, or git tracks a link in `.dvc`.
    """
    check_links(git_root(root))
    with dvc_errors(f"DVC cannot add data/{domain}"):
        from dvc.repo import Repo

        with Repo(str(root)) as dvc:
            dvc.add(str(root / "data" / domain))
    pointer = [path for path in (f"data/{domain}.dvc", "data/.gitignore") if (root / path).exists()]
    _stage(root, *pointer)
    new = git(root, "diff", "--cached", "--name-only", "--diff-filter=A", "--", *SET_UP).splitlines()
    git_commit(root, message, [*pointer, *new])
    return resolve_commit(root, "HEAD")


def _stage(root: Path, *paths: str) -> None:
    git(root, "add", "--", *(path for path in paths if (root / path).exists()))


def open_pointers(root: Path, commit: str, scratch: Path) -> Any:
    """The DVC repository as it is at `commit`, for what its pointers say; DVC's own files go to `scratch`."""
    from dvc.repo import Repo

    dvc = Repo(str(root), rev=commit, uninitialized=True, config=_folders(scratch, scratch / "cache"))
    dvc.config["remote"] = dvc.config.validate({"remote": remotes_of(dvc.config)})["remote"]
    return dvc


def open_dvc(root: Path, commit: str, scratch: Path, remote_only: bool = False) -> Any:
    """The DVC repository as it is at `commit`, with the storage that is configured today.

    At an old commit the remote or the cache folder may not have been what it is now. Files are copied out of DVC's
    cache, never linked: a link would break, or change, with the cache. `scratch` takes DVC's index of the data, which
    otherwise lies in a database that all processes of the machine share, and that remembers damaged listings. With
    `remote_only` the cache is an empty folder in there, where the repository has a default remote.

    Raises:
        DatasetError: see `flows.data.storage.storage_of`.
    """
    from dvc.repo import Repo

    storage = storage_of(root)
    own = remote_only and storage.default is not None
    cache = scratch / "cache" if own or storage.cache is None else storage.cache
    config = _folders(scratch, cache) | {"remote": storage.remotes}
    # uninitialized: the first pointer may have been committed before .dvc was.
    dvc = Repo(str(root), rev=commit, uninitialized=True, config=config, remote=storage.default)
    dvc.config["remote"] = dvc.config.validate({"remote": storage.remotes})["remote"]  # nothing of the commit's own
    return dvc


def _folders(scratch: Path, cache: Path) -> dict[str, Any]:
    return {"core": {"site_cache_dir": str(scratch)}, "cache": {"dir": str(cache), "type": "copy"}}


@contextmanager
def dvc_errors(what: str) -> Iterator[None]:
    """Silence DVC's log, spinner and progress bars (they ask for the log level), and make one line of its errors."""
    from dvc.exceptions import DvcException
    from dvc.ui import ui

    ui.error_console.quiet = True
    for name in ("dvc", "dvc_objects", "dvc_data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    except DvcException as error:
        raise DatasetError(f"{what}: {one_line(error)}") from error
