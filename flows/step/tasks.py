"""The tasks of domains in a step: are they fit to be asked, before pruning; and what the models make of them, after it.

lm-evaluation-harness asks them (`flows.step.harness`), offline, in a process that sees no hub.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from copal.config import fingerprint
from copal.errors import SettingsError
from copal.files import write_atomic
from copal.progress import Progress, silent
from flows.data.task_files import TaskFile, read_tasks
from flows.lineage.tasks import TaskFigures
from flows.machine import forward_dtype, harness_version
from flows.project import Project
from flows.settings import Settings
from flows.step.dense import known_task_figures
from flows.step.resolve import Step
from flows.step.resources import check_whole_model
from flows.step.windows import of_domain

__all__ = ["ask_tasks", "check_tasks"]

_OFFLINE = {
    **dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE"), "1"),
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def check_tasks(project: Project, step: Step, data: Mapping[str, str]) -> None:
    """Refuse a step whose tasks cannot be asked, before it prunes; nothing is done where no domain has tasks.

    Args:
        data: domain -> folder.

    Raises:
        DataError: a task is not what may be asked; `UnusableDataError` where it is of the new domain.
        SettingsError: lm-evaluation-harness is not installed.
        ResourceError: memory is not enough for the whole model.
    """
    tasks = _tasks(step, data, project.settings)
    if not tasks:
        return
    check_whole_model(project.settings, step.base)
    if new := [task for task in tasks if task.domain == step.new]:  # those of others were asked before
        with of_domain(new[0].domain, step.new):
            _run(step, project.settings, new, [], silent)


def ask_tasks(
    project: Project, step: Step, data: Mapping[str, str], progress: Progress = silent
) -> dict[str, dict[str, TaskFigures]]:
    """Domain -> task -> figures of the staged version, and of the dense base where the lineage does not know them.

    Raises:
        CopalError: as `check_tasks`.
    """
    tasks = _tasks(step, data, project.settings)
    if not tasks:
        return {}
    registry, harness = project.registry, harness_version()
    assert harness is not None
    known = known_task_figures(registry, registry.version(step.head), forward_dtype(project.settings))
    unknown = [number for number, task in enumerate(tasks) if task.digest not in known]
    models = [{"folder": str(step.out / "model"), "tasks": list(range(len(tasks)))}]
    if unknown:
        models.append({"folder": str(step.base), "tasks": unknown})
    pruned, *dense = _run(step, project.settings, tasks, models, progress)
    known |= {tasks[number].digest: found["figures"] for number, found in zip(unknown, *dense, strict=True)}
    found: dict[str, dict[str, TaskFigures]] = {}
    for task, answer in zip(tasks, pruned, strict=True):
        found.setdefault(task.domain, {})[task.name] = TaskFigures(
            digest=task.digest,
            harness=harness,
            documents=answer["documents"],
            metric=task.metric,
            higher_is_better=task.higher_is_better,
            figures=answer["figures"],
            dense=known[task.digest],
        )
    return found


def _tasks(step: Step, data: Mapping[str, str], settings: Settings) -> list[TaskFile]:
    """The tasks of all domains in their folders, with digests that tell how much is asked, and by which harness."""
    tasks: list[TaskFile] = []
    for domain in sorted(data):
        with of_domain(domain, step.new):
            tasks += read_tasks(domain, Path(data[domain]))
    harness = harness_version()
    if tasks and harness is None:
        raise SettingsError(
            f"data/{tasks[0].domain}/tasks needs lm-evaluation-harness, which is not installed: pip install "
            "'copal[tasks]'. Nothing was pruned: without it the version's figures would lack those tasks"
        )
    limit = settings.evaluate.task_limit
    return [replace(task, digest=fingerprint([task.digest, limit, harness])) for task in tasks]


def _run(
    step: Step,
    settings: Settings,
    tasks: Sequence[TaskFile],
    models: Sequence[Mapping[str, Any]],
    progress: Progress,
) -> list[list[dict[str, Any]]]:
    # These bring torch, which what finds nothing to do can do without.
    from flows.step.harness import REQUEST_FILE, RESULT_FILE
    from flows.step.launch import raise_fault, run_alone

    folder = step.run / "tasks"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    request = {
        "tasks": [{"domain": task.domain, "config": dict(task.config)} for task in tasks],
        "models": models,
        "limit": settings.evaluate.task_limit,
        "dtype": settings.model.dtype,
        "batch": settings.model.batch,
    }
    write_atomic(folder / REQUEST_FILE, json.dumps(request))
    fault = run_alone("flows.step.harness", folder, progress, _OFFLINE)
    if fault is not None:
        raise_fault(fault)
    found: list[list[dict[str, Any]]] = json.loads((folder / RESULT_FILE).read_text())
    shutil.rmtree(folder)
    return found
