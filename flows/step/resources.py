"""Does a step fit? What it takes (`copal.estimate`) against what is free, before anything is fetched or begun."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from copal.errors import ResourceError
from flows.lineage.figures import gigabytes
from flows.machine import device_and_dtype, free_device_memory, free_disk, free_memory
from flows.project import Project
from flows.settings import Settings

if TYPE_CHECKING:
    from copal.estimate import Estimate
    from copal.shapes import StepSettings
    from flows.registry.registry import Registry
    from flows.registry.versions import ModelVersion

__all__ = [
    "Demand",
    "Needs",
    "check_resources",
    "config_of_base",
    "demands",
    "domains_after",
    "needs",
    "settings_of_step",
    "shortages",
]

_MEMORY = 1.2  # times what was computed: tests hold that to a fifth of what steps take
_DISK = 1.05  # likewise; headers, reports and MLflow's own files
_PROCESS = 600 * 10**6  # bytes of Python and its libraries in each of several processes


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """Bytes that a step needs on each machine that takes it, a margin included.

    Attributes:
        disk: of its own folder, and of the version where that stays.
        memory: of all processes together, beside what Python takes in one of them.
        gpu: of the memory of each GPU; 0 without one.
    """

    disk: int
    memory: int
    gpu: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """How much of something a step needs, a margin included, and how much of it is free; in bytes.

    Attributes:
        kind: `disk`, `memory` or `gpu`.
        what: in words.
        margin: what `needed` has to spare, in words: how exact the computation is.
        advice: what to do where it is not enough.
    """

    kind: str
    what: str
    margin: str
    needed: int
    free: int
    advice: str


def check_resources(project: Project, domains: int, begun: int = 0) -> None:
    """Refuse a step to a version with so many domains where it would not fit; nothing is fetched but config.json.

    Args:
        begun: bytes on the disk that a killed run of the step has left, and that this one goes on from or removes.

    Raises:
        ResourceError: says what is needed and what is free.
        ModelError: the base cannot be read.
    """
    if not project.settings.run.check_resources:
        return
    with config_of_base(project.registry) as folder:
        lacking = shortages(demands(project, folder, domains, begun=begun)) if folder else ()
    if lacking:
        raise ResourceError(
            f"{'; '.join(lacking)}. Nothing was begun; run.check_resources: false in params.yaml begins it all the same"
        )


def shortages(found: tuple[Demand, ...]) -> tuple[str, ...]:
    """What is not enough, in words."""
    return tuple(
        f"a step needs about {gigabytes(one.needed)} of {one.what}, {one.margin} to spare included, and "
        f"{gigabytes(one.free)} are free: {one.advice}"
        for one in found
        if one.needed > one.free
    )


def needs(found: Estimate, processes: int) -> Needs:
    """What a step that was estimated needs, run by so many processes."""
    # A version is copied from the step's folder to where it stays, or what it builds on was fetched from there.
    return Needs(
        disk=int(_DISK * (found.disk.most + found.disk.version)),
        memory=int(_MEMORY * found.memory.host) + (_PROCESS * processes if processes > 1 else 0),
        gpu=int(_MEMORY * found.memory.device),
    )


def domains_after(registry: Registry, head: ModelVersion, domain: str, *, withdraws: bool = False) -> int:
    """How many domains the version after `head` has, once this one is added, replaced or withdrawn."""
    others = {known.name for known in registry.record(head).domains} - {domain}
    return len(others) + (not withdraws)


def demands(
    project: Project, folder: Path, domains: int, found: Estimate | None = None, kept: int = 0, begun: int = 0
) -> tuple[Demand, ...]:
    """What a step to a version with so many domains needs, against what is free.

    Args:
        folder: with the base's config.json.
        found: what was computed for it, if it was.
        kept: bytes that stay on the disk of steps before it, which are not there yet.
        begun: bytes of the step that are there already.
    """
    from copal.estimate import estimate_step

    settings, work = project.settings, project.workspace
    asked = settings_of_step(settings, domains)
    found = found or estimate_step(folder, asked)
    least = needs(found, settings.model.processes)
    needed = [
        Demand(
            kind="disk",
            what=f"disk in {work.private}",
            margin="a twentieth",
            needed=max(0, least.disk + kept - begun),
            free=free_disk(work.private),
            advice="free some (`copal gc --dry-run` says what can go), or move the workspace to a larger disk",
        ),
        Demand(
            kind="memory",
            what="memory",
            margin="a fifth",
            needed=least.memory,
            free=free_memory(),
            advice="lower model.batch or model.processes, or take a machine with more",
        ),
    ]
    if (free := free_device_memory(settings.model.processes)) is not None:
        needed.append(_device(folder, asked, least, free))
    return tuple(needed)


def _device(folder: Path, asked: StepSettings, least: Needs, free: int) -> Demand:
    """A step halves the batch where memory runs out: what counts is one window at a time."""
    from copal.estimate import estimate_step

    needed = least.gpu
    if needed > free:
        needed = needs(estimate_step(folder, replace(asked, batch=1)), asked.processes).gpu
    return Demand(
        kind="gpu",
        what="GPU memory (with one window at a time)",
        margin="a fifth",
        needed=needed,
        free=free,
        advice="take a larger GPU or one that nobody else uses, or hide it (CUDA_VISIBLE_DEVICES=) to use memory",
    )


def settings_of_step(settings: Settings, domains: int) -> StepSettings:
    """What decides how large a step is, on this machine."""
    from copal.shapes import StepSettings

    device, dtype = device_and_dtype(settings)
    return StepSettings(
        calibration=settings.calibration,
        prune=settings.prune,
        domains=domains,
        dtype=dtype,
        batch=settings.model.batch,
        processes=settings.model.processes,
        nodes=settings.model.nodes,
        on_gpu=device.type != "cpu",
        resumes=True,
    )


@contextmanager
def config_of_base(registry: Registry) -> Iterator[Path | None]:
    """A folder with the config.json of the lineage's base, which alone is fetched; None where it is not there."""
    root = registry.root()
    assert root is not None
    with registry.stored(root, "model/config.json") as stored:
        places = (stored / "model", stored)  # all of a version that is here, or the one file that was fetched
        yield next((place for place in places if (place / "config.json").is_file()), None)
