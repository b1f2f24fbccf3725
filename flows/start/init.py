"""Makes workspaces: a git + DVC repository with params.yaml and data/, and the root of its lineage."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from copal.errors import SettingsError
from copal.files import write_atomic
from copal.progress import Progress
from flows.data.dvc import SET_UP, init_repository
from flows.data.git import commit, git
from flows.params import load_settings
from flows.settings import Settings
from flows.workspace import Workspace, WorkspaceError, exclusive, make_private, open_workspace

if TYPE_CHECKING:
    from flows.models.base import BaseModel
    from flows.registry.versions import ModelVersion

__all__ = ["default_params", "init_with_base", "init_workspace", "model_name_for"]

_DATA_README = """\
# The domains of this workspace

A domain is a folder here, `data/<domain>/`, with `.txt` files (a document each), `.jsonl` or `.parquet` files (a
document a row: its text in the field `text`, optionally an `id`). Its name is of a-z, 0-9, `_` and `-`.

    copal add <domain> PATH...    # puts files here, tracks them with DVC and commits the pointer
    copal watch --once
"""

# What an init may write to in a folder that was there before.
_FILES = (*SET_UP, "params.yaml", "data/README.md")
_FOLDERS = (".git", ".dvc", ".copal", "data")


def init_workspace(folder: Path, model_name: str | None = None) -> Workspace:
    """Make `folder` a workspace, or complete it; what is there already stays. Commits what it wrote, and only that.

    `model_name` names the lineage in a new params.yaml; None derives it from the folder's name. A folder that cannot
    become a workspace is left as it was.

    Raises:
        WorkspaceError: the folder is a file.
        SettingsError: the params.yaml that is there is bad.
        GitError: git refuses.
        DatasetError: DVC refuses.
    """
    folder = folder.expanduser().resolve()
    with _as_before_on_error(folder):
        workspace = _lay_out(folder, model_name)
        _commit(folder)
    return workspace


def init_with_base(
    folder: Path, source: str, progress: Progress, model_name: str | None = None
) -> tuple[Workspace, ModelVersion]:
    """`init_workspace`, and register the base model `source` as version 1 of its lineage.

    The base is fetched first, so that a bad source shows before anything is made; the registry keeps the only copy.

    Raises:
        CopalError: as `init_workspace`, `fetch_base`, `load_settings` and `register_root`.
    """
    from flows.models.base import fetch_base

    folder = folder.expanduser().resolve()
    with _as_before_on_error(folder), exclusive(Workspace(folder)):
        fetched = Workspace(folder).runs / f"fetched-base-{os.getpid()}"
        try:
            base = fetch_base(source, fetched, progress)
            from flows.lineage.page.page import render_page  # these bring MLflow and torch
            from flows.project import project_of, read_history
            from flows.step.register import register_root

            workspace = _lay_out(folder, model_name)
            settings = load_settings(workspace.params)
            _check_window(settings, base)
            project = project_of(workspace, settings)
            root = register_root(project, base, progress)
            project.registry.log_page(root, render_page(read_history(project)))
        finally:
            shutil.rmtree(fetched, ignore_errors=True)
        _commit(folder)
    return workspace, root


def model_name_for(folder: Path) -> str:
    """A name for the lineage of the workspace in `folder`: the folder's name, without what no model name may have."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.name).lstrip("._-")[:64]
    return plain or "copal"


def default_params(model_name: str) -> str:
    """The text of a new params.yaml: every setting at its default, with what it means."""
    template = files(__package__).joinpath("params.yaml").read_text(encoding="utf-8")
    name = json.dumps(model_name, ensure_ascii=False)  # in quotes: a folder may be called 2026
    return template.replace(f"{'MODEL_NAME':<17}", f"{name:<17}")


def _lay_out(folder: Path, model_name: str | None) -> Workspace:
    if (folder / "params.yaml").exists():  # it stays as it is, so it has to be good
        load_settings(folder / "params.yaml")
    init_repository(folder)
    _write_new(folder / "params.yaml", default_params(model_name or model_name_for(folder)))
    _write_new(folder / "data" / "README.md", _DATA_README)
    workspace = open_workspace(folder)
    make_private(workspace)
    return workspace


def _write_new(path: Path, text: str) -> None:
    if path.exists():
        return
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, text)


def _commit(folder: Path) -> None:
    """Commit what makes the workspace; anything else that is staged stays staged."""
    paths = [name for name in _FILES if (folder / name).exists()]
    git(folder, "add", "--", *paths)
    commit(folder, "Make this a copal workspace", paths)


def _check_window(settings: Settings, base: BaseModel) -> None:
    """Check that the base has learned positions for the windows that it will be calibrated on."""
    length, longest = settings.calibration.window_length, base.longest_window
    if longest is not None and length > longest:
        raise SettingsError(
            f"calibration.window_length is {length}, and {base.source} has learned positions for {longest} tokens: "
            "make the workspace without --base, lower that setting in its params.yaml, and register the base then"
        )


@contextmanager
def _as_before_on_error(folder: Path) -> Iterator[None]:
    """Put `folder` back as it was if an error leaves the `with`: what was not there goes, small files come back."""
    if folder.exists() and not folder.is_dir():
        raise WorkspaceError(f"{folder} is a file; name a folder")
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    files = [folder / name for name in _FILES]
    if (folder / ".git").exists():
        files.append(folder / git(folder, "rev-parse", "--git-path", "index").rstrip("\n"))
    before = {path: path.read_bytes() if path.is_file() else None for path in files}
    absent = [folder / name for name in _FOLDERS if not (folder / name).exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path, content in before.items():
            if content is not None:
                path.write_bytes(content)
            else:
                path.unlink(missing_ok=True)
        for path in absent:
            shutil.rmtree(path, ignore_errors=True)
        if new:
            shutil.rmtree(new[-1], ignore_errors=True)
        raise
