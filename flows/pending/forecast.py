"""What would run if the watcher looked now: in which order, how long, how large, and with which settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.data.fetch import listed_here
from flows.data.task_files import count_tasks
from flows.lineage.figures import timespan
from flows.lineage.record import Record
from flows.machine import device_and_dtype, hardware, harness_version, has_gpu
from flows.params import recorded_settings
from flows.pending.changes import Change, changes
from flows.pending.plan import Plan, plan
from flows.pending.status import held_back, plain_dataset
from flows.project import Project

if TYPE_CHECKING:
    from copal.estimate import Estimate
    from flows.data.dataset import DatasetVersion

    _Clock = Callable[[Estimate], dict[str, float]]  # seconds by part of a step

__all__ = ["forecast"]

_TIMED = ("statistics", "way back", "solve", "evaluation")  # what a record tells the seconds of


def forecast(project: Project) -> dict[str, Any]:
    """What `copal watch --once` would do, as plain JSON values; nothing is begun, and no weights are fetched.

    `model`. `head`: number, None without a base. `gates`: whether those of the head would run first. `steps`, in order,
    each with domain, dvc_md5, git_rev, replaces (whether the version before it knows other data of the domain), version
    (the number it would get), domains (how many that would have), tasks (of these domains, how many it would be asked;
    None where DVC's cache does not tell), seconds (by part of the step, rough), disk (bytes by part; `version` stays),
    needed and free ({disk, memory, gpu}: bytes, a margin included), refused (why it would be, or None). `timed_by`:
    what the seconds rest on. `settings`: those that differ from the head's, see `flows.pending.changes.Change`.
    `waiting`, `refused`, `notes` and `problems` as in `flows.pending.status.status`.

    Raises:
        DatasetError, RegistryError, LineageError: see `flows.pending.plan.plan`.
        SettingsError: another copal made the head.
        ModelError: the base cannot be read.
    """
    found = plan(project)
    told: dict[str, Any] = {
        "model": project.name,
        "head": None,
        "gates": False,
        "steps": [],
        "timed_by": None,
        "settings": [],
        **held_back(found),
    }
    if found.head is None:
        return told
    record = project.registry.record(found.head)
    differ = changes(record, project.settings, found.head.number)
    told |= {"head": found.head.number, "gates": not found.head.concluded, "settings": list(map(asdict, differ))}
    return told | _steps(project, found, record, differ) if found.pending else told


def _steps(project: Project, found: Plan, record: Record, differ: Sequence[Change]) -> dict[str, Any]:
    """The steps that are pending, and what their seconds rest on."""
    from flows.step.resources import config_of_base

    registry = project.registry
    with config_of_base(registry) as folder:
        if folder is None:
            registry.folder(registry.versions()[0])  # says what is wrong
            raise AssertionError("the base has a config.json after all")
        timed_by, clock = _clock(project, record, folder)
        against = [f"{one.name} is {one.now}, not {one.then}: {one.takes}" for one in differ if one.refused]
        return {"steps": list(_each(project, found, record, folder, clock, against)), "timed_by": timed_by}


def _each(
    project: Project, found: Plan, record: Record, folder: Path, clock: _Clock, against: list[str]
) -> Iterator[dict[str, Any]]:
    """The steps, each as if those before it had been taken."""
    from copal.estimate import estimate
    from copal.shapes import model_shape
    from flows.step.resources import demands, settings_of_step, shortages

    assert found.head is not None
    known, kept = {domain.name for domain in record.domains}, 0
    tasks: dict[str, int | None] = {domain: len(found) for domain, found in record.tasks.items()}
    shape = model_shape(folder, settings_of_step(project.settings, 1))
    for number, version in enumerate(found.pending, start=found.head.number + 1):
        replaces, known = version.domain in known, known | {version.domain}
        taken = estimate(shape, settings_of_step(project.settings, len(known)))
        needed = demands(project, folder, len(known), taken, kept)
        kept += taken.disk.version
        lacking = [*(shortages(needed) if project.settings.run.check_resources else ())]
        tasks[version.domain] = _tasks_of(project, version)
        if any(tasks.values()) and harness_version() is None:
            lacking.append("its tasks need lm-evaluation-harness: pip install 'copal[tasks]'")
        yield {
            **plain_dataset(version),
            "version": number,
            "replaces": replaces,
            "domains": len(known),
            "tasks": None if None in tasks.values() else sum(filter(None, tasks.values())),
            "seconds": clock(taken),
            "disk": {**asdict(taken.disk), "version": taken.disk.version},
            "needed": {one.kind: one.needed for one in needed},
            "free": {one.kind: one.free for one in needed},
            "refused": "; ".join((*against, *lacking)) or None,
        }


def _tasks_of(project: Project, version: DatasetVersion) -> int | None:
    listed = listed_here(project.workspace, project.settings.watch, version)
    return None if listed is None else count_tasks(listed)


def _clock(project: Project, record: Record, folder: Path) -> tuple[str, _Clock]:
    """What tells the seconds of an estimate: a short product on this machine; where the head was made here too, so that
    what it took comes out right.
    """
    from copal.estimate import estimate_step, seconds
    from copal.hardware import this_machine
    from flows.step.resources import settings_of_step

    settings = project.settings
    machine = this_machine(*device_and_dtype(settings))
    times, timed_by = 1.0, "a short product on this machine: it may be half or twice as long"
    if record.step is not None and record.hardware == hardware(settings):
        then = recorded_settings(record.settings, "the record of the newest version")
        made = seconds(estimate_step(folder, settings_of_step(then, len(record.domains))), machine)
        took = record.seconds.total
        if took > 0:
            times = took / sum(made.get(part, 0.0) for part in _TIMED)
            timed_by = f"the {timespan(took)} that the newest version took on this machine"

    def clock(found: Estimate) -> dict[str, float]:
        parts = seconds(found, machine, settings.model.nodes * (settings.model.processes if has_gpu() else 1))
        return {part: spent * (times if part in _TIMED else 1.0) for part, spent in parts.items()}

    return timed_by, clock
