"""`copal doctor`: is this machine ready, and what to do if not. Python, libraries, git, stores, room, workspace,
domains and their tasks."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from copal.errors import CopalError, one_line
from flows.cli import stores
from flows.cli.checks import Check, package
from flows.data.git import run_git
from flows.lineage.figures import gigabytes
from flows.machine import free_disk, free_memory, harness_version
from flows.params import load_settings
from flows.settings import Settings
from flows.workspace import Workspace, WorkspaceError, open_workspace

if TYPE_CHECKING:
    from flows.step.resources import Demand

__all__ = ["Check", "doctor", "render"]

# What a broken installation raises when it is imported or asked.
_BROKEN = (ImportError, OSError, RuntimeError, AttributeError, ValueError)
_GIB = 1 << 30


def doctor(path: Path) -> list[Check]:
    """Look at everything that copal needs. Works outside a workspace too; changes nothing."""
    workspace, settings, place = _workspace(path)
    looks: list[tuple[str, Callable[[], Check]]] = [
        ("python", _python),
        ("torch", lambda: _torch(settings)),
        ("transformers", lambda: package("transformers")),
        ("git", lambda: _git(path)),
        ("dvc", lambda: _dvc(workspace, settings)),
        ("domains", lambda: _domains(workspace, settings)),
        ("other data", lambda: _other_data(workspace)),
        ("tasks", lambda: _tasks(workspace)),
        ("mlflow", lambda: stores.mlflow(workspace, settings)),
        ("artifacts", lambda: stores.artifacts(workspace, settings)),
        ("ledger", lambda: stores.ledger(workspace, settings)),
        ("prefect", stores.prefect),
        ("fastapi", lambda: package("fastapi")),
        ("disk", lambda: _room("disk", path, workspace, settings)),
        ("memory", lambda: _room("memory", path, workspace, settings)),
    ]
    return [*(_look(name, look) for name, look in looks), place]


def render(checks: Iterable[Check]) -> str:
    """Plain lines: a mark, the name, what was found, and below it the advice."""
    marks = {True: "ok", False: "wrong", None: "note"}
    lines = []
    for check in checks:
        lines.append(f"{marks[check.ok]:<6}{check.name:<13}{check.found}")
        if check.advice:
            lines.append(f"{'':<19}-> {check.advice}")
    return "\n".join(lines)


def _look(name: str, look: Callable[[], Check]) -> Check:
    """One thing that is broken must not keep the others from being looked at."""
    try:
        return look()
    except CopalError as error:
        return Check(name=name, ok=False, found=one_line(error), advice="mend what the line above names")
    except _BROKEN as error:
        return Check(
            name=name, ok=False, found=f"is broken: {one_line(error)}", advice="install copal again, in a new venv"
        )


def _python() -> Check:
    found = f"{sys.version.split()[0]} ({sys.executable})"
    enough = sys.version_info >= (3, 11)
    return Check(
        name="python", ok=enough, found=found, advice="" if enough else "make a venv with Python 3.11 or newer"
    )


def _torch(settings: Settings) -> Check:
    check = package("torch")
    if not check.ok:
        return check
    import torch

    from copal.streaming import compute_dtype

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = str(compute_dtype(settings.model.dtype, device)).removeprefix("torch.")
    if device.type == "cuda":
        gib = torch.cuda.get_device_properties(device).total_memory / _GIB
        kind = f"{torch.cuda.get_device_name(device)}, {gib:.0f} GiB"
    else:
        kind = f"CPU, {torch.get_num_threads()} threads"
    unused = device.type == "cpu" and shutil.which("nvidia-smi") is not None
    return Check(
        name="torch",
        ok=None if unused else True,
        found=f"{check.found}, {kind}, products in {dtype}",
        advice="this torch does not see the NVIDIA GPU: install a CUDA build, see pytorch.org" if unused else "",
    )


def _git(path: Path) -> Check:
    if shutil.which("git") is None:
        return Check(name="git", ok=False, found="is not on PATH", advice="install git")
    here = path if path.is_dir() else Path.cwd()

    def ask(*arguments: str) -> str:
        return run_git(here, *arguments).stdout.strip()

    version = ask("--version").removeprefix("git version ")
    name, email = ask("config", "user.name"), ask("config", "user.email")
    if name and email:
        return Check(name="git", ok=True, found=f"{version}, commits as {name} <{email}>")
    return Check(
        name="git",
        ok=None,
        found=f"{version}, knows no user name or e-mail address",
        advice="git config --global user.name NAME; git config --global user.email ADDRESS",
    )


def _dvc(workspace: Workspace | None, settings: Settings) -> Check:
    check = package("dvc")
    if not check.ok or workspace is None:
        return check
    from flows.data.commits import watched_revision
    from flows.data.dvc import dvc_errors
    from flows.data.repositories import data_root
    from flows.data.storage import storage_of
    from flows.data.versions import dataset_versions

    root, branch = data_root(workspace, settings.watch), settings.watch.branch or "HEAD"
    domains = [version.domain for version in dataset_versions(root, watched_revision(root, settings.watch.branch))]
    found = f"{check.found}, domains at {branch}: {', '.join(domains) or 'none'}"
    with dvc_errors(f"DVC cannot read {root}"):
        remotes = storage_of(root).remotes
    if remotes:
        return Check(name="dvc", ok=True, found=found)
    return Check(
        name="dvc",
        ok=None,
        found=f"{found}; no remote",
        advice="the data is on this machine only: dvc remote add -d NAME URL, then dvc push",
    )


def _domains(workspace: Workspace | None, settings: Settings) -> Check:
    """Whether there is data that no step can use."""
    if workspace is None:
        return Check(name="domains", ok=True, found="none here: they are folders of a workspace, under data/")
    from flows.pending.plan import plan
    from flows.project import project_of
    from flows.start.add import moved_away

    if moved := moved_away(workspace):
        data = "; ".join(f"of data/{domain} to {folder}" for domain, folder in moved)
        return Check(
            name="domains",
            ok=None,
            found=f"a `copal add` that was killed has moved older data: {data}",
            advice="copal add DOMAIN data/DOMAIN: brings it back where data/DOMAIN is not there, else commits what is "
            "there and deletes the older",
        )
    found = plan(project_of(workspace, settings))
    lines = [*found.problems, *(f"{version.path}: {refusal.reason}" for version, refusal in found.refused)]
    if lines:
        return Check(
            name="domains",
            ok=None,
            found=f"refused: {'; '.join(lines)}",
            advice="mend the data and commit its new version, or change the setting; `copal adapt DOMAIN` tries "
            "at once",
        )
    return Check(name="domains", ok=True, found="none is refused")


def _other_data(workspace: Workspace | None) -> Check:
    """Whether data/ holds what nobody tracks."""
    from flows.data.versions import untracked

    found = untracked(workspace.root) if workspace is not None else []
    if not found:
        return Check(name="other data", ok=True, found="none lies under data/")
    return Check(
        name="other data",
        ok=None,
        found=f"{', '.join(f'data/{name}' for name in found)}: no domain, DVC does not track it",
        advice=f"copal add DOMAIN data/{found[0]}, or move it away",
    )


def _tasks(workspace: Workspace | None) -> Check:
    """Whether what asks the tasks of domains is there, where domains have some."""
    from flows.data.task_files import read_tasks

    folders = sorted(workspace.data.iterdir()) if workspace and workspace.data.is_dir() else []
    tasks = [task for folder in folders if folder.is_dir() for task in read_tasks(folder.name, folder)]
    harness = harness_version()
    if tasks and harness is None:
        return Check(
            name="tasks",
            ok=False,
            found=f"{len(tasks)} in data/, and lm-evaluation-harness is not installed: no step would prune",
            advice="pip install 'copal[tasks]'",
        )
    found = f"{len(tasks)} in data/, asked by lm-evaluation-harness {harness}" if tasks else "none in data/"
    return Check(name="tasks", ok=True, found=found)


def _room(name: str, path: Path, workspace: Workspace | None, settings: Settings) -> Check:
    """What is free of `name` (disk or memory), against what a step to one more domain needs."""
    free = free_disk(path) if name == "disk" else free_memory()
    kinds = ("disk",) if name == "disk" else ("memory", "gpu")
    found = [one for one in _demands(workspace, settings) if one.kind in kinds]
    if not found:
        said = f"{gigabytes(free)} free; `copal sizes MODEL` says what a step on a model needs"
        return Check(name=name, ok=True, found=said)
    lacking = [one for one in found if one.needed > one.free]
    said = "; ".join(
        f"{gigabytes(one.free)} of {one.what} free; a step needs about {gigabytes(one.needed)}" for one in found
    )
    return Check(name=name, ok=not lacking, found=said, advice="; ".join(one.advice for one in lacking))


def _demands(workspace: Workspace | None, settings: Settings) -> tuple[Demand, ...]:
    """What a step needs; nothing where there is no base yet, or no workspace."""
    from flows.project import project_of
    from flows.step.resources import config_of_base, demands

    if workspace is None:
        return ()
    project = project_of(workspace, settings)
    try:
        head = project.registry.head()
        if head is None:
            return ()
        domains = len(project.registry.record(head).domains)
        with config_of_base(project.registry) as folder:
            return demands(project, folder, domains + 1) if folder else ()
    except CopalError:  # the check of MLflow tells
        return ()


def _workspace(path: Path) -> tuple[Workspace | None, Settings, Check]:
    """The workspace where there is a usable one, its settings or else the defaults, and the check of both."""
    try:
        workspace = open_workspace(path)
    except WorkspaceError as error:
        return None, Settings(), Check(name="workspace", ok=None, found="none here", advice=one_line(error))
    try:
        settings = load_settings(workspace.params)
    except CopalError as error:
        return None, Settings(), Check(name="workspace", ok=False, found=one_line(error), advice="mend params.yaml")
    return workspace, settings, Check(name="workspace", ok=True, found=f"{workspace.root}, model {settings.model.name}")
