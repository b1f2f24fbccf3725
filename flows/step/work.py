"""The work of a step as plain functions, which `flows.runs.tasks` wraps in Prefect tasks: fetch, prune, evaluate.

They take and give paths, ids and small values, never tensors.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from copal.files import write_atomic
from copal.progress import Progress, silent
from flows.data.recorded import dataset_of
from flows.lineage.record import Domain, LeftOut
from flows.machine import device_and_dtype, forward_dtype
from flows.project import Project, data_of
from flows.settings import Settings
from flows.step.dense import known_figures
from flows.step.resolve import Step
from flows.step.staging import EVALUATION_FILE, Evaluation, evaluation_text
from flows.step.windows import cut_windows, of_domain

if TYPE_CHECKING:
    from copal.calibration import DomainWindows
    from copal.step import StepReport

__all__ = [
    "evaluate_step",
    "fetch_data",
    "prune_domain",
]


def fetch_data(project: Project, step: Step) -> dict[str, str]:
    """Fetch every domain of the new version at its data version: domain -> folder. The work tree is not touched.

    What a step takes out is not fetched.

    Raises:
        MissingDataError: a pointer's data is nowhere.
        DatasetError: what was fetched is not what the pointer says.
        DataError: a file has a name that is none; `UnusableDataError` where it is of the domain that the step adds.
    """
    wanted = [*([] if step.withdraws else [step.version]), *map(dataset_of, step.earlier)]
    folders = {}
    for version in wanted:
        with of_domain(version.domain, step.new):
            folders[version.domain] = str(data_of(project, version))
    return folders


def prune_domain(settings: Settings, step: Step, data: Mapping[str, str], progress: Progress = silent) -> StepReport:
    """Prune the base for every domain so far and the step's own, or without the one that it takes out; stages model/
    and state/, and until then each whole block.

    Args:
        data: domain -> folder, as `fetch_data` gives it; the step's own is enough where `step.left_out` is known.

    Raises:
        CopalError: see `copal.step.prune_step` and `copal.calibration.domain_windows`.
    """
    from copal.step import Base, NewDomain, Parent, WithdrawnDomain, prune_step

    domain: NewDomain | WithdrawnDomain
    if step.withdraws:
        domain = WithdrawnDomain(name=step.version.domain)
    else:
        domain = NewDomain(
            name=step.version.domain,
            md5=step.version.md5,
            weight=settings.weight(step.version.domain),
            windows=_windows(step, data, settings)[step.version.domain].calibration,
        )
    parent = None
    if step.parent:
        parent = Parent(version=step.head, model=step.parent / "model", state=step.parent / "state", states=step.states)
    base = Base(folder=step.base, fingerprint=step.base_fingerprint)
    if settings.model.processes > 1 or step.helpers:
        from flows.step.distributed import prune_in_processes

        return prune_in_processes(
            step.run / "prune", settings, base, parent, domain, step.out, step.unfinished, progress, step.helpers
        )
    device, dtype = device_and_dtype(settings)
    return prune_step(
        base,
        parent,
        domain,
        step.out,
        calibration=settings.calibration,
        prune=settings.prune,
        device=device,
        dtype=dtype,
        batch=settings.model.batch,
        resume=step.unfinished,
        progress=progress,
    )


def evaluate_step(
    project: Project,
    step: Step,
    report: StepReport,
    data: Mapping[str, str],
    progress: Progress = silent,
) -> Evaluation:
    """Evaluate the staged version on every domain, the parent on the new domain, if any, and the dense base where the
    lineage does not know its figure (`flows.step.dense`): as a rule on the new domain alone.
    """
    from flows.step.distributed import evaluate_in_processes, evaluate_jobs

    began = time.perf_counter()
    settings, registry = project.settings, project.registry
    new = step.new
    windows = _windows(step, data, settings)
    tokens = {name: found.evaluation for name, found in windows.items()}

    known = known_figures(registry, registry.version(step.head), forward_dtype(settings))
    digests = {name: found.evaluation_digest for name, found in windows.items()}
    dense = {name: known[digest] for name, digest in digests.items() if digest in known}
    jobs: dict[str, tuple[Path, list[str]]] = {"after": (step.out / "model", list(tokens))}
    if unknown := [name for name in tokens if name not in dense]:
        jobs["dense"] = (step.base, unknown)
    if new and step.parent:
        jobs["before"] = (step.parent / "model", [new])
    model, todo = settings.model, list(jobs.values())
    if model.processes > 1 or step.helpers:
        scores = evaluate_in_processes(step.run / "evaluate", settings, todo, tokens, progress, step.helpers)
    else:
        scores = evaluate_jobs(todo, tokens, dtype=model.dtype, batch=model.batch, progress=progress)
    found = {
        job: {name: score.perplexity for name, score in by_domain.items()}
        for job, by_domain in zip(jobs, scores, strict=True)
    }
    dense |= found.get("dense", {})
    before = None if new is None else found.get("before", dense)[new]
    evaluation = Evaluation(
        perplexity=found["after"],
        dense=dict(sorted(dense.items())),
        before=before,
        domains=_evaluated(step, report, windows),
        seconds=time.perf_counter() - began,
    )
    write_atomic(step.run / EVALUATION_FILE, evaluation_text(evaluation))
    return evaluation


def _evaluated(step: Step, report: StepReport, windows: Mapping[str, DomainWindows]) -> tuple[Domain, ...]:
    """The domains of the new version by name, each with the windows that it was evaluated on."""
    new = step.new
    domains = [
        entry.model_copy(
            update={
                "evaluation_digest": windows[entry.name].evaluation_digest,
                "evaluation_tokens": _predicted(windows[entry.name]),
            }
        )
        for entry in step.earlier
    ]
    if new is not None:
        own = next(entry for entry in report.manifest.domains if entry.name == new)
        domains.append(
            Domain(
                name=new,
                path=step.version.path,
                dvc_md5=step.version.md5,
                git_rev=step.version.git_rev,
                repository=step.version.repository,
                weight=own.weight,
                tokens=own.tokens,
                windows=own.windows,
                contribution_version=None,
                evaluation_digest=windows[new].evaluation_digest,
                evaluation_tokens=_predicted(windows[new]),
                left_out=LeftOut(**asdict(windows[new].left_out)),
            )
        )
    return tuple(sorted(domains, key=lambda domain: domain.name))


def _windows(step: Step, data: Mapping[str, str], settings: Settings) -> dict[str, DomainWindows]:
    return cut_windows(step.base, data, step.earlier, step.new, step.left_out, settings.calibration)


def _predicted(windows: DomainWindows) -> int:
    """Predicted tokens of the evaluation windows: all of a window but its first."""
    return windows.evaluation.shape[0] * (windows.evaluation.shape[1] - 1)
