"""`copal doctor`: is this machine ready, and what to do if not. Python, libraries, git, stores, room, workspace."""

from __future__ import annotations

import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from copal.errors import CopalError
from flows.data.git import run_git
from flows.lineage.figures import gigabytes
from flows.machine import free_disk, free_memory
from flows.params import load_settings
from flows.settings import Settings
from flows.uris import without_secrets
from flows.workspace import Workspace, WorkspaceError, open_workspace

if TYPE_CHECKING:
    from flows.step.resources import Demand

__all__ = ["Check", "doctor", "render"]

# What a broken installation raises when it is imported or asked.
_BROKEN = (ImportError, OSError, RuntimeError, AttributeError, ValueError)
_GIB = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """What a look at one thing found.

    Attributes:
        ok: True; False where copal cannot work like this; None where it can, but the user should know.
        advice: what to do; empty where there is nothing to do.
    """

    name: str
    ok: bool | None
    found: str
    advice: str = ""


def doctor(path: Path) -> list[Check]:
    """Look at everything that copal needs. Works outside a workspace too; changes nothing."""
    workspace, settings, place = _workspace(path)
    looks: list[tuple[str, Callable[[], Check]]] = [
        ("python", _python),
        ("torch", lambda: _torch(settings)),
        ("transformers", lambda: _package("transformers")),
        ("git", lambda: _git(path)),
        ("dvc", lambda: _dvc(workspace, settings)),
        ("domains", lambda: _domains(workspace, settings)),
        ("mlflow", lambda: _mlflow(workspace, settings)),
        ("ledger", lambda: _ledger(workspace, settings)),
        ("prefect", _prefect),
        ("fastapi", lambda: _package("fastapi")),
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
        return Check(name=name, ok=False, found=_line(error), advice="mend what the line above names")
    except _BROKEN as error:
        return Check(
            name=name, ok=False, found=f"is broken: {_line(error)}", advice="install copal again, in a new venv"
        )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _python() -> Check:
    found = f"{sys.version.split()[0]} ({sys.executable})"
    enough = sys.version_info >= (3, 11)
    return Check(
        name="python", ok=enough, found=found, advice="" if enough else "make a venv with Python 3.11 or newer"
    )


def _package(name: str) -> Check:
    """Whether a package is installed in the range that copal's own metadata asks for."""
    from packaging.requirements import Requirement

    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name=name, ok=False, found="is not installed", advice=f"pip install {name}")
    try:
        wanted = [Requirement(line) for line in metadata.requires("copal") or []]
    except metadata.PackageNotFoundError:  # copal runs from its sources
        wanted = []
    for requirement in wanted:
        fits = requirement.specifier.contains(version, prereleases=True)
        if requirement.name == name and not requirement.marker and not fits:
            return Check(
                name=name,
                ok=False,
                found=f"{version}, copal needs {requirement.specifier}",
                advice=f"pip install '{name}{requirement.specifier}'",
            )
    return Check(name=name, ok=True, found=version)


def _torch(settings: Settings) -> Check:
    check = _package("torch")
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
    check = _package("dvc")
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

    found = plan(project_of(workspace, settings))
    lines = [*found.problems, *(f"{version.path}: {refusal.reason}" for version, refusal in found.refused)]
    if not lines:
        return Check(name="domains", ok=True, found="none is refused")
    return Check(
        name="domains",
        ok=None,
        found=f"refused: {'; '.join(lines)}",
        advice="mend the data and commit its new version, or change the setting; `copal adapt DOMAIN` tries at once",
    )


def _mlflow(workspace: Workspace | None, settings: Settings) -> Check:
    check = _package("mlflow")
    if not check.ok or workspace is None:
        return check
    from flows.project import project_of

    store = without_secrets(workspace.registry_uri(settings))
    head = project_of(workspace, settings).registry.head()
    if head is None:
        return Check(
            name="mlflow",
            ok=None,
            found=f"{check.found}, no version of {settings.model.name} in {store}",
            advice=f"register a base model: copal init {workspace.root} --base SOURCE",
        )
    return Check(
        name="mlflow",
        ok=True,
        found=f"{check.found}, newest is version {head.number} of {settings.model.name} in {store}",
    )


def _ledger(workspace: Workspace | None, settings: Settings) -> Check:
    if workspace is None:
        return Check(
            name="ledger", ok=True, found="claims and log: in the workspace, unless ledger.uri names a database"
        )
    from flows.ledger import Ledger

    entries = Ledger(workspace.ledger_uri(settings), settings.model.name).log()
    store = without_secrets(workspace.ledger_uri(settings))
    return Check(name="ledger", ok=True, found=f"{len(entries)} log entries of {settings.model.name} in {store}")


def _prefect() -> Check:
    check = _package("prefect")
    if not check.ok:
        return check
    from prefect.settings import get_current_settings

    address = get_current_settings().api.url
    if not address:
        return Check(name="prefect", ok=True, found=f"{check.found}, a temporary server for each run")
    shown = without_secrets(address)
    try:
        with urllib.request.urlopen(f"{address.rstrip('/')}/health", timeout=5):
            pass
    except urllib.error.HTTPError:
        pass  # it wants an authentication that this check does not have, but it is there
    except OSError as error:
        return Check(
            name="prefect",
            ok=False,
            found=f"{check.found}, the server {shown} does not answer ({_line(error)})",
            advice="start it, or unset PREFECT_API_URL to use a temporary one",
        )
    return Check(name="prefect", ok=True, found=f"{check.found}, the server {shown} answers")


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
        return None, Settings(), Check(name="workspace", ok=None, found="none here", advice=_line(error))
    try:
        settings = load_settings(workspace.params)
    except CopalError as error:
        return None, Settings(), Check(name="workspace", ok=False, found=_line(error), advice="mend params.yaml")
    return workspace, settings, Check(name="workspace", ok=True, found=f"{workspace.root}, model {settings.model.name}")
