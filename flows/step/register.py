"""A staged version gets its record and becomes a version of the registry."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from copal.progress import Progress, silent
from flows.lineage.files import version_files
from flows.lineage.record import Base, Code, Domain, Layer, MatrixRow, Parent, Record, Seconds, Sparsity, Withdrawn
from flows.machine import surroundings
from flows.project import Project, hold_lineage
from flows.registry.flavor import write_flavor
from flows.settings import Settings, without_secrets
from flows.step.resolve import Step
from flows.step.staging import Evaluation

if TYPE_CHECKING:
    from copal.step import StepReport
    from flows.models.base import BaseModel
    from flows.registry.registry import Registry
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
    from copal.evaluation import backward_transfer
    from flows.registry.runs import DomainMetrics

    settings, registry = project.settings, project.registry
    progress("register", 0, 1)
    head = registry.version(step.head)
    parent_record = registry.record(head)
    when_newest = _perplexity_when_newest(registry, step.earlier)
    now = {name: evaluation.perplexity[name] for name in when_newest}
    write_flavor(step.out)
    data = Withdrawn(name=step.version.domain, dvc_md5=step.version.md5)  # of a domain's other data the tombstone stays
    withdrawn = (*(entry for entry in parent_record.withdrawn if entry != data), *([data] if step.withdraws else []))
    record = Record(
        model=settings.model.name,
        parent=Parent(version=step.head, digest=parent_record.digest),
        base=parent_record.base,
        key=step.key,
        step=next((domain for domain in evaluation.domains if domain.contribution_version is None), None),
        domains=evaluation.domains,
        withdrawn=withdrawn,
        settings=_recorded(settings),
        settings_fingerprint=settings.fingerprint(),
        sparsity=Sparsity(target=settings.prune.sparsity, counted=report.sparsity),
        weights_back=report.weights_back if step.parent else None,
        perplexity=evaluation.perplexity,
        dense_perplexity=evaluation.dense,
        matrix=_matrix(parent_record, step.head, evaluation.perplexity),
        perplexity_before=evaluation.before,
        backward_transfer=backward_transfer(when_newest, now),
        seconds=Seconds(**report.seconds, evaluate=evaluation.seconds),
        layers=tuple(
            Layer(
                name=layer.name,
                tokens=layer.tokens,
                sparsity=layer.zeros / layer.weights,
                weights_back=layer.weights_back if step.parent else None,
                layer_error_before=layer.error_before,
                layer_error_after=layer.error_after,
                response_shift=layer.response_shift,
                damping=layer.damping,
            )
            for layer in report.layers
        ),
        **_surroundings(settings),
        files=version_files(step.out),
    )
    metrics = [
        DomainMetrics(
            domain=domain.name,
            dvc_md5=domain.dvc_md5,
            git_rev=domain.git_rev,
            path=domain.path,
            repository=domain.repository,
            perplexity=evaluation.perplexity[domain.name],
            dense_perplexity=evaluation.dense[domain.name],
            tokens=domain.evaluation_tokens,
        )
        for domain in evaluation.domains
    ]
    registered = registry.register(
        step.out, record, metrics=metrics, parent=head, expected_head=step.head, seal=seal, why=step.why
    )
    progress("register", 1, 1)
    return registered


def register_root(project: Project, base: BaseModel, progress: Progress = silent) -> ModelVersion:
    """Register the dense base as version 1, the root of the lineage; again: gives the version that is there.

    Raises:
        LineageConflictError: the name's lineage has another base.
    """
    workspace, settings = project.workspace, project.settings
    progress("register base", 0, 1)
    workspace.runs.mkdir(parents=True, exist_ok=True)
    scratch = TemporaryDirectory(prefix="base-", dir=workspace.runs)
    with hold_lineage(project, "register the base") as claim, scratch as folder:
        staged = Path(folder)
        shutil.copytree(base.folder, staged / "model", copy_function=_link_or_copy)
        write_flavor(staged)
        record = Record(
            model=settings.model.name,
            parent=None,
            base=Base(fingerprint=base.fingerprint, source=base.source),
            key=None,
            step=None,
            domains=(),
            withdrawn=(),
            settings=_recorded(settings),
            settings_fingerprint=settings.fingerprint(),
            sparsity=Sparsity(target=None, counted=0.0),
            weights_back=None,
            perplexity={},
            dense_perplexity={},
            matrix=(),
            perplexity_before=None,
            backward_transfer=None,
            seconds=Seconds(statistics=0.0, solve=0.0, evaluate=0.0),
            layers=(),
            **_surroundings(settings),
            files=version_files(staged),
        )
        registered = project.registry.register(
            staged, record, metrics=[], parent=None, expected_head=None, seal=claim.seal
        )
        claim.unseal()
    progress("register base", 1, 1)
    return registered


def _link_or_copy(source: str, target: str) -> None:
    """A second name for a file costs nothing, where the file system allows it; else a copy."""
    try:
        Path(target).hardlink_to(Path(source).resolve())  # the file itself: a link's own second name may lead nowhere
    except OSError:  # across file systems, or one without hard links
        shutil.copy2(source, target)


def _perplexity_when_newest(registry: Registry, earlier: tuple[Domain, ...]) -> dict[str, float]:
    """For each earlier domain its perplexity in the version that its data version made, on the same windows."""
    found = {}
    for entry in earlier:
        assert entry.contribution_version is not None
        record = registry.record(registry.version(entry.contribution_version))
        if record.step is not None and record.step.evaluation_digest == entry.evaluation_digest:
            found[entry.name] = record.perplexity[entry.name]
    return found


def _matrix(parent: Record, number: int, perplexity: Mapping[str, float]) -> tuple[MatrixRow, ...]:
    """The parent's rows of perplexities, its own with its number now, and the new version's."""
    rows = [
        MatrixRow(version=number if row.version is None else row.version, perplexity=row.perplexity)
        for row in parent.matrix
    ]
    return (*rows, MatrixRow(version=None, perplexity=perplexity))


def _recorded(settings: Settings) -> dict[str, Any]:
    """The settings in full, without the passwords that URLs may hold."""
    return {
        section: {name: without_secrets(value) if isinstance(value, str) else value for name, value in values.items()}
        for section, values in settings.as_dict().items()
    }


def _surroundings(settings: Settings) -> dict[str, Any]:
    found = surroundings(settings)
    return {**found, "code": Code(**found["code"])}
