"""The record of a version that is staged: what the lineage will say of it for good."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.lineage.files import version_files
from flows.lineage.record import Base, Code, Domain, Layer, MatrixRow, Parent, Record, Seconds, Sparsity, Withdrawn
from flows.machine import surroundings
from flows.project import Project
from flows.settings import Settings
from flows.step.resolve import Step
from flows.step.staging import Evaluation
from flows.uris import without_secrets

if TYPE_CHECKING:
    from copal.step import StepReport
    from flows.registry.registry import Registry

__all__ = ["record_of_root", "record_of_step"]


def record_of_step(project: Project, step: Step, report: StepReport, evaluation: Evaluation) -> Record:
    """The record of the version that a step staged; its files are hashed here."""
    from copal.evaluation import backward_transfer

    settings, registry = project.settings, project.registry
    parent = registry.record(registry.version(step.head))
    when_newest = _perplexity_when_newest(registry, step.earlier)
    now = {name: evaluation.perplexity[name] for name in when_newest}
    data = Withdrawn(name=step.version.domain, dvc_md5=step.version.md5)  # of a domain's other data the tombstone stays
    return Record(
        model=project.name,
        parent=Parent(version=step.head, digest=parent.digest),
        base=parent.base,
        key=step.key,
        step=next((domain for domain in evaluation.domains if domain.contribution_version is None), None),
        domains=evaluation.domains,
        withdrawn=(*(entry for entry in parent.withdrawn if entry != data), *([data] if step.withdraws else [])),
        settings=_recorded(settings),
        settings_fingerprint=settings.fingerprint(),
        sparsity=Sparsity(target=settings.prune.sparsity, counted=report.sparsity),
        weights_back=report.weights_back if step.parent else None,
        perplexity=evaluation.perplexity,
        dense_perplexity=evaluation.dense,
        matrix=_matrix(parent, step.head, evaluation.perplexity),
        perplexity_before=evaluation.before,
        backward_transfer=backward_transfer(when_newest, now),
        seconds=Seconds(**report.seconds, evaluate=evaluation.seconds),
        layers=_layers(step, report),
        tasks=evaluation.tasks,
        **_surroundings(settings),
        files=version_files(step.out),
    )


def record_of_root(project: Project, fingerprint: str, source: str, staged: Path) -> Record:
    """The record of the dense base in the folder `staged`, the root of the lineage.

    Args:
        fingerprint, source: of the base, see `flows.models.base.BaseModel`.
    """
    settings = project.settings
    return Record(
        model=project.name,
        parent=None,
        base=Base(fingerprint=fingerprint, source=source),
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


def _layers(step: Step, report: StepReport) -> tuple[Layer, ...]:
    return tuple(
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
    )


def _perplexity_when_newest(registry: Registry, earlier: tuple[Domain, ...]) -> dict[str, float]:
    """For each earlier domain its perplexity in the version that its data version made, on the same windows."""
    found = {}
    for entry in earlier:
        assert entry.contribution_version is not None
        record = registry.record(registry.kept(entry.contribution_version))
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
    found: dict[str, Any] = _bare(settings.as_dict())
    return found


def _bare(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _bare(one) for name, one in value.items()}
    return without_secrets(value) if isinstance(value, str) else value


def _surroundings(settings: Settings) -> dict[str, Any]:
    found = surroundings(settings)
    return {**found, "code": Code(**found["code"])}
