"""A staged version gets its record and becomes a version of the registry."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from copal.progress import Progress, silent
from flows.project import Project, hold_lineage
from flows.registry.flavor import write_flavor
from flows.step.record import record_of_root, record_of_step
from flows.step.resolve import Step
from flows.step.staging import Evaluation
from flows.workspace import make_private

if TYPE_CHECKING:
    from copal.step import StepReport
    from flows.models.base import BaseModel
    from flows.registry.versions import ModelVersion

__all__ = [
    "register_root",
    "register_step",
]


def register_step(
    project: Project,
    step: Step,
    report: StepReport,
    evaluation: Evaluation,
    seal: Callable[[str], None] | None = None,
    progress: Progress = silent,
) -> ModelVersion:
    """Register the staged version with its record; it becomes `latest` last of all.

    Args:
        seal: see `flows.registry.Registry.register`.

    Raises:
        HeadMovedError: another version was registered since `resolve`.
        ClaimLostError: the lineage was taken over.
        RegistryError: the registry cannot be written.
    """
    registry = project.registry
    progress("register", 0, 1)
    head = registry.version(step.head)
    write_flavor(step.out)
    registered = registry.register(
        step.out,
        record_of_step(project, step, report, evaluation),
        parent=head,
        expected_head=step.head,
        seal=seal,
        why=step.why,
    )
    registry.keep(registered, step.out)
    progress("register", 1, 1)
    return registered


def register_root(project: Project, base: BaseModel, progress: Progress = silent) -> ModelVersion:
    """Register the dense base as version 1, the root of the lineage; again: gives the version that is there.

    Raises:
        LineageConflictError: the name's lineage has another base.
    """
    workspace = project.workspace
    progress("register base", 0, 1)
    make_private(workspace, workspace.runs)
    scratch = TemporaryDirectory(prefix="base-", dir=workspace.runs)
    with hold_lineage(project, "register the base") as claim, scratch as folder:
        staged = Path(folder)
        shutil.copytree(base.folder, staged / "model", copy_function=_link_or_copy)
        write_flavor(staged)
        record = record_of_root(project, base.fingerprint, base.source, staged)
        registered = project.registry.register(staged, record, parent=None, expected_head=None, seal=claim.seal)
        claim.unseal()
    progress("register base", 1, 1)
    return registered


def _link_or_copy(source: str, target: str) -> None:
    """A second name for a file costs nothing, where the file system allows it; else a copy."""
    try:
        Path(target).hardlink_to(Path(source).resolve())  # the file itself: a link's own second name may lead nowhere
    except OSError:  # across file systems, or one without hard links
        shutil.copy2(source, target)
