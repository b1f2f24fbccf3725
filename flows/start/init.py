"""Makes workspaces: a git + DVC repository with params.yaml and data/, and the root of its lineage."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from copal.files import write_atomic
from copal.progress import Progress
from flows.data.git import commit, git
from flows.settings import load_settings
from flows.workspace import Workspace, WorkspaceError, exclusive, open_workspace

if TYPE_CHECKING:
    from flows.registry.registry import ModelVersion

__all__ = ["default_params", "init_with_base", "init_workspace", "model_name_for"]

_DATA_README = """\
# The domains of this workspace

A domain is a folder here, `data/<domain>/`, with `.txt` files (a document each), `.jsonl` or `.parquet` files (a
document a row: its text in the field `text`, optionally an `id`). Its name is of a-z, 0-9, `_` and `-`.

    dvc add data/<domain> && git add data && git commit -m "Add <domain>"
    copal watch --once
"""

# What an init may write to in a folder that was there before.
_FILES = (".gitignore", ".dvcignore", ".dvc/config", ".dvc/.gitignore", "params.yaml", "data/README.md")
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
    from flows.lineage.page.page import render_page
    from flows.project import project_of
    from flows.registry.history import read_history
    from flows.step.register import register_root

    folder = folder.expanduser().resolve()
    with _as_before_on_error(folder), exclusive(Workspace(folder)):
        from flows.models.base import fetch_base

        fetched = Workspace(folder).runs / f"fetched-base-{os.getpid()}"
        try:
            base = fetch_base(source, fetched, progress)
            workspace = _lay_out(folder, model_name)
            settings = load_settings(workspace.params)
            project = project_of(workspace, settings)
            root = register_root(project, base, progress)
            project.registry.log_page(root, render_page(read_history(project.registry)))
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
    import yaml

    name = model_name if yaml.safe_load(model_name) == model_name else f'"{model_name}"'  # a folder may be called 2026
    return f"""\
# The settings of this workspace. Everything may be left out; what stands here are the defaults, but for model.name.

model:
  name: {name:<17} # the registered model: one name is one lineage (one base, one sparsity pattern)
  dtype: auto             # of the forward passes: bfloat16, float32, or auto (ask the machine)
  processes: 1            # that share a step's work: one for each GPU, say
  batch: 8                # windows that run through a block at a time; a step halves it where memory runs out

calibration:              # how the text of a domain becomes windows of tokens
  window_length: 512      # tokens
  windows: 24             # calibration windows of a domain, at most
  evaluation_windows: 16  # evaluation windows of a domain, at most; at least 8
  evaluation_share: 0.2   # share of a domain's documents kept for evaluation, never calibrated on
  seed: 0
  storage: full           # of a domain's statistics; or compact: an eighth of the size, somewhat worse models

prune:
  sparsity: 0.5           # share of zeros in every pruned linear, between 0 and 1; or N:M in quotes, as "2:4"
  criterion: output       # or gradient: needs an accumulator as big as the model
  rounds: [0.6, 0.8, 0.9, 1.0]  # sparsity after each round, as shares of the above; rising, the last one 1
  iterations: 8           # conjugate-gradient iterations of a round, at most
  exponent: 0.35          # of a channel's second moment in the score of a weight; 0.5 is Wanda's
  damping: 0.1            # added to every entry of the diagonal of the second moment, as a share of it

domains: {{}}               # weights in the loss, where not 1.0:  {{legal: {{weight: 2.0}}}}

gates:                    # what a version must hold before it may serve; null or false: that gate is off
  forgetting: 0.15        # no domain worse than when it was the newest by more than this share of its perplexity
  champion: 0.12          # nor than in the champion
  dense: 2.0              # perplexity at most so many times the dense base's; more sparsity needs more
  improvement: true       # the new domain is better than in the parent, where that is pruned
  generation: true        # a prompt of each domain gives finite text that is not one token over and over
  promote: manual         # what passes waits for `copal promote`; or auto: it becomes the champion

watch:
  repository: null        # the git + DVC repository with the domains, a path or a URL; null: this one
  branch: null            # whose pointers are wanted; null: whatever HEAD is
  interval: 60.0          # seconds between two checks
  cron: null              # for `copal up`, goes before interval: "0 3 * * 1-5" (minute hour day month weekday, UTC)

run:
  lease: 60.0             # seconds after which a worker that gives no sign of life may be taken over
  time_limit: null        # seconds after which a step is stopped; null: never

registry:
  uri: null               # an MLflow tracking URI; null: SQLite in .copal/
                          # (COPAL_REGISTRY_URI, else MLFLOW_TRACKING_URI, goes first)

signing:                  # of new versions; needs `pip install model-signing pyopenssl`
  key: null               # a private key, PEM, elliptic curve; null: versions are not signed
  public_key: null        # what `copal verify` checks signatures with, PEM; null: the public half of key
"""


def _lay_out(folder: Path, model_name: str | None) -> Workspace:
    from flows.data.dvc import init_repository

    if (folder / "params.yaml").exists():  # it stays as it is, so it has to be good
        load_settings(folder / "params.yaml")
    init_repository(folder)
    _write_new(folder / "params.yaml", default_params(model_name or model_name_for(folder)))
    _write_new(folder / "data" / "README.md", _DATA_README)
    workspace = open_workspace(folder)
    workspace.private.mkdir(exist_ok=True)
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
