"""What a killed process left to do: moves of aliases that are only logged, gates that did not run, useless run folders.

Whoever takes the lineage does this first.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.gates.champion import settle, unsettled, unshown
from flows.project import Project, complete_log, hold_aliases, read_log
from flows.step.resolve import UNFINISHED
from flows.step.staging import run_folders

if TYPE_CHECKING:
    from flows.ledger import Claim
    from flows.registry.versions import ModelVersion

__all__ = ["finish", "sweep"]


def finish(project: Project, claim: Claim, run_gates: Callable[[Project, ModelVersion, Claim], Any]) -> None:
    """Do what a killed process left undone after its registration or promotion. Only for who holds the lineage.

    Raises:
        CopalError: see `flows.gates.run.run_gates`.
    """
    entries = complete_log(project)
    if unsettled(project, entries) or unshown(project, entries):
        with hold_aliases(project, "finish a move"):
            settle(project, read_log(project))
    head = project.registry.head()
    if head is not None and not head.concluded:
        run_gates(project, head, claim)


def sweep(project: Project, taken: Path | None = None) -> None:
    """Remove the run folders of steps on versions that are not the head any more: nobody can publish them.

    Args:
        taken: the run folder of the step that is about to be taken. When it is published, nobody can publish another on
            this head: so what others have not finished goes too, and the disk holds that of one step at a time.
    """
    head = project.registry.head()
    for folder, built_on in run_folders(project).items():
        if built_on is not None and head is not None and built_on < head.number:
            shutil.rmtree(folder)
        elif taken is not None and folder != taken:
            shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
