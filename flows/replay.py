"""Replay: a version made again from its record in a scratch folder, and what differs from the one that is stored."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from copal.errors import CopalError
from copal.progress import Progress, silent
from flows.lineage import DomainRecord, verify_files, withdrawal_of
from flows.settings import Workspace, load_settings, recorded_settings
from flows.stages import dataset_of, exclusive, prune_domain, step_on, surroundings

if TYPE_CHECKING:
    from flows.registry import ModelVersion, Registry

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
    workspace: Workspace,
    registry: Registry,
    version: ModelVersion,
    *,
    keep: Path | None = None,
    progress: Progress = silent,
) -> Replay:
    """Make `version` again from the base, its data at the recorded md5 and the recorded settings, and compare.

    Keeps `copal gc` waiting, which deletes what this reads.

    Args:
        keep: a new folder for what was made; None: it is deleted.

    Raises:
        ReplayError: there is nothing to make again, or the stored files are not those of the record.
        CopalError: data is gone, or a file cannot be read.
    """
    from flows.datasets import fetch_version

    record = registry.record(version)
    if record["parent"] is None:
        raise ReplayError(f"version {version.number} is the dense base: nothing was computed")
    if keep is not None and keep.exists():
        raise ReplayError(f"{keep} exists; name a new folder")
    folder = registry.folder(version)
    dropped = {"sum_dropped": version.sum_dropped, "contribution_dropped": version.contribution_dropped}
    problems = [line for line in verify_files(record, folder, **dropped) if ": model/" in line]
    if problems:
        raise ReplayError(f"version {version.number}: {problems[0]}; bring the stored model back from a copy first")
    parent = registry.version(record["parent"]["version"])
    gone = withdrawal_of(record)
    entry = record["step"]
    if gone is not None:
        entry = next(each for each in registry.record(parent)["domains"] if each["name"] == gone["name"])
    dataset = dataset_of(DomainRecord(**entry))
    settings = recorded_settings(record["settings"], f"the record of version {version.number}")
    workspace.runs.mkdir(parents=True, exist_ok=True)
    with exclusive(workspace), TemporaryDirectory(prefix="replay-", dir=workspace.runs) as scratch:
        step = step_on(registry, parent, dataset, record["key"], Path(scratch), withdraws=gone is not None)
        data = None
        if gone is None:
            data = str(fetch_version(workspace, load_settings(workspace.params).watch, dataset))
        report = prune_domain(settings, step, data, progress)
        masks, largest = _compare(step.out / "model", folder / "model")
        total = sum(layer.weights for layer in report.layers)
        if keep is not None:
            keep.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(step.out, keep)
    now = surroundings(settings)
    differ = {
        f"{part}.{name}": (str(record[part].get(name)), str(now[part].get(name)))
        for part in ("libraries", "hardware", "code")
        for name in sorted({*record[part], *now[part]})
        if record[part].get(name) != now[part].get(name)
    }
    return Replay(
        version=version.number,
        identical=masks == 0 and largest == 0,
        masks_differ=masks / total,
        largest_difference=largest,
        surroundings=differ,
    )


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
