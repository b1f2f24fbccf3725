"""Replay: a version made again from its record in a scratch folder, and what differs from the one that is stored."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from copal.errors import CopalError
from copal.progress import Progress, silent
from flows.data.recorded import dataset_of
from flows.lineage.files import verify_files
from flows.lineage.record import Record
from flows.machine import surroundings
from flows.params import recorded_settings
from flows.project import Project, data_of
from flows.settings import Settings
from flows.step.resolve import Step, inputs_of, step_on
from flows.step.work import prune_domain
from flows.workspace import exclusive, make_private

if TYPE_CHECKING:
    from flows.registry.registry import Registry
    from flows.registry.versions import ModelVersion

__all__ = ["Replay", "ReplayError", "replay"]


class ReplayError(CopalError):
    """A version cannot be made again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Replay:
    """What came of a replay.

    Attributes:
        masks_differ: share of the pruned weights that are zero in one of the two and not in the other.
        largest_difference: of a weight.
        surroundings: what differs from the record: name -> (then, now).
    """

    version: int
    identical: bool
    masks_differ: float
    largest_difference: float
    surroundings: dict[str, tuple[str, str]]

    def as_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def replay(
    project: Project,
    version: ModelVersion,
    *,
    last_step: bool = False,
    keep: Path | None = None,
    progress: Progress = silent,
) -> Replay:
    """Make `version` again from its record, and compare: the base, the data of every domain at its md5, the settings.

    Keeps `copal gc` waiting, which deletes what this may read.

    Args:
        last_step: only the step that made it, on the statistics that the parent's state holds; of a withdrawal, no data
            at all.
        keep: a new folder for what was made; None: it is deleted.

    Raises:
        ReplayError: there is nothing to make again, or the stored files are not those of the record.
        CopalError: data is gone, or a file cannot be read.
    """
    workspace, registry = project.workspace, project.registry
    record = registry.record(version)
    if record.parent is None:
        raise ReplayError(f"version {version.number} is the dense base: nothing was computed")
    if keep is not None and keep.exists():
        raise ReplayError(f"{keep} exists; name a new folder")
    folder = registry.folder(version)
    problems = [line for line in verify_files(record, folder, **version.dropped) if ": model/" in line]
    if problems:
        raise ReplayError(f"version {version.number}: {problems[0]}; bring the stored model back from a copy first")
    settings = recorded_settings(record.settings, f"the record of version {version.number}")
    make_private(workspace, workspace.runs)
    with exclusive(workspace), TemporaryDirectory(prefix="replay-", dir=workspace.runs) as scratch:
        plan = _last_step if last_step else _from_data
        made: Path | None = None
        for of_step, step in plan(registry, version, settings, Path(scratch)):
            step.run.mkdir(exist_ok=True)
            data = {} if step.withdraws else {step.version.domain: str(data_of(project, step.version))}
            report = prune_domain(of_step, step, data, progress)
            if made is not None:
                shutil.rmtree(made)
            made = step.out
        assert made is not None
        masks, largest = _compare(made / "model", folder / "model")
        total = sum(layer.weights for layer in report.layers)
        if keep is not None:
            keep.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(made, keep)
    return Replay(
        version=version.number,
        identical=masks == 0 and largest == 0,
        masks_differ=masks / total,
        largest_difference=largest,
        surroundings=_differences(record, settings),
    )


def _differences(record: Record, settings: Settings) -> dict[str, tuple[str, str]]:
    """What surrounded the step then and surrounds it now, where the two differ: name -> (then, now)."""
    then, now = record.as_json(), surroundings(settings)
    return {
        f"{part}.{name}": (str(then[part].get(name)), str(now[part].get(name)))
        for part in ("libraries", "hardware", "code")
        for name in sorted({*then[part], *now[part]})
        if then[part].get(name) != now[part].get(name)
    }


def _from_data(
    registry: Registry, version: ModelVersion, settings: Settings, scratch: Path
) -> Iterator[tuple[Settings, Step]]:
    """One step a domain, in the order in which they came: contributions are added as they were, to the last bit.

    Of the steps before the last one only the statistics count, so they prune as cheaply as can be.
    """
    record, root = registry.record(version), registry.root()
    assert root is not None
    entries = sorted(record.domains_at(version.number), key=lambda entry: entry.contribution_version or 0)
    cheap = replace(settings.prune, rounds=(1.0,), iterations=1)
    parent = None
    for place, entry in enumerate(entries, start=1):
        came = registry.record(registry.kept(entry.contribution_version or version.number))
        then = recorded_settings(came.settings, f"the record of version {entry.contribution_version}")
        step = Step(
            model=registry.model_name,
            head=place,
            base=registry.folder(root) / "model",
            base_fingerprint=record.base.fingerprint,
            parent=parent,
            states={},
            run=scratch / entry.name,
            version=dataset_of(entry),
            key=_key(record),
            earlier=tuple(entries[: place - 1]),
            left_out=entry.left_out,
        )
        yield then.model_copy(update={"prune": settings.prune if place == len(entries) else cheap}), step
        parent = step.out


def _last_step(
    registry: Registry, version: ModelVersion, settings: Settings, scratch: Path
) -> Iterator[tuple[Settings, Step]]:
    """The step that made the version, on its parent."""
    record = registry.record(version)
    assert record.parent is not None
    parent = registry.kept(record.parent.version)
    gone, entry = record.withdraws, record.step
    if gone is not None:
        entry = next(each for each in registry.record(parent).domains if each.name == gone.name)
    assert entry is not None
    inputs = inputs_of(registry, parent)
    step = step_on(registry, parent, inputs, dataset_of(entry), _key(record), scratch, withdraws=gone is not None)
    yield settings, replace(step, left_out=entry.left_out)


def _key(record: Record) -> str:
    assert record.key is not None  # only the root has none
    return record.key


def _compare(made: Path, stored: Path) -> tuple[int, float]:
    """How many weights are zero in one model and not in the other, and the largest difference of a weight."""
    from copal.checkpoint import Checkpoint

    one, other = Checkpoint(made), Checkpoint(stored)
    if one.names() != other.names():
        raise ReplayError(f"{stored} has other tensors than the model that was made again")
    masks, largest = 0, 0.0
    for name in one.names():
        (ours,), (theirs,) = one.read([name]).values(), other.read([name]).values()
        masks += int(((ours == 0) != (theirs == 0)).sum())
        largest = max(largest, float((ours.double() - theirs.double()).abs().max()))
    return masks, largest
