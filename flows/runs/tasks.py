"""The five tasks of a step as Prefect tasks: with retries where trying again can help (fetching over a network, a
registry that is busy) and none where it cannot (bad input).

The work is done by plain functions in `flows.step` and `flows.gates`. Prefect caches, hashes and stores nothing of it;
tasks take a project and give paths, ids and small values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task

from copal.errors import CopalError
from copal.progress import Progress
from copal.step import StepReport
from flows.gates.judge import GateResult
from flows.gates.run import run_gates
from flows.ledger import Claim
from flows.machine import has_gpu
from flows.project import Project
from flows.registry.versions import ModelVersion
from flows.runs.artifacts import progress_artifacts, show_gates
from flows.runs.events import tell_gates
from flows.runs.log import tell
from flows.step.register import register_step
from flows.step.resolve import Step
from flows.step.run import Tasks
from flows.step.staging import Evaluation
from flows.step.work import evaluate_step, fetch_data, prune_domain
from flows.terminal.progress import Stages, progress_bar

__all__ = ["step_tasks"]

_STAGES = ("fetch", "statistics", "prune", "evaluate", "register", "gates")
_PAUSES = [2.0, 10.0]  # seconds before the second and the third try


def _may_pass(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Whether trying again can help: not against what a user has to mend."""
    return not isinstance(state.result(raise_on_failure=False), CopalError)


@task(cache_policy=NO_CACHE, persist_result=False, retries=2, retry_delay_seconds=_PAUSES, retry_condition_fn=_may_pass)
def fetch(project: Project, step: Step) -> dict[str, str]:
    """Fetch every domain's data version."""
    with _progress(project, step, "fetch"):
        return fetch_data(project, step)


@task(cache_policy=NO_CACHE, persist_result=False)
def prune(project: Project, step: Step, data: Mapping[str, str], claim: Claim) -> StepReport:
    """One COPAL step; on the GPU where there is one."""
    calibration = project.settings.calibration
    tokens = {"statistics": calibration.windows * calibration.window_length}
    with _progress(project, step, "statistics", tokens) as progress:
        return prune_domain(project.settings, step, data, claim.guard(progress))


@task(cache_policy=NO_CACHE, persist_result=False)
def evaluate(project: Project, step: Step, report: StepReport, data: Mapping[str, str], claim: Claim) -> Evaluation:
    """Perplexity on the new domain before the step and on every domain after it."""
    calibration = project.settings.calibration
    tokens = {"evaluate": len(data) * calibration.evaluation_windows * calibration.window_length}
    with _progress(project, step, "evaluate", tokens) as progress:
        return evaluate_step(project, step, report, data, claim.guard(progress))


@task(cache_policy=NO_CACHE, persist_result=False, retries=2, retry_delay_seconds=_PAUSES, retry_condition_fn=_may_pass)
def register(project: Project, step: Step, report: StepReport, evaluation: Evaluation, claim: Claim) -> ModelVersion:
    """Register the version: the last thing that happens, it makes it `latest`."""
    with _progress(project, step, "register") as progress:
        return register_step(project, step, report, evaluation, claim.seal, progress)


@task(cache_policy=NO_CACHE, persist_result=False, retries=2, retry_delay_seconds=_PAUSES, retry_condition_fn=_may_pass)
def gates(project: Project, version: ModelVersion, claim: Claim) -> tuple[GateResult, ...]:
    """Run the gates of the registered version and move the aliases that they move."""
    with _progress(project, version, "gates"):
        results = run_gates(project, version, claim, tell)
    show_gates(project.name, version.number, results)
    tell_gates(project.name, version.number, results)
    return results


def step_tasks() -> Tasks:
    """The tasks of a step, tagged with the device that they would use here."""
    device = "gpu" if has_gpu() else "cpu"
    return Tasks(
        fetch=fetch,
        prune=prune.with_options(tags=[device], task_run_name=f"prune on {device}"),
        evaluate=evaluate,
        register=register,
        gates=gates,
    )


@contextmanager
def _progress(
    project: Project, of: Step | ModelVersion, first: str, tokens: Mapping[str, int] | None = None
) -> Iterator[Progress]:
    """A callback that shows progress on the terminal and on the page of the run.

    Args:
        of: the step, or the version that it made.
        first: the stage that begins now.
        tokens: see `flows.terminal.progress.Stages`.
    """
    about = of.version.domain if isinstance(of, Step) else f"version {of.number}"
    page = progress_artifacts(project.name)
    with progress_bar(Stages(about=about, order=_STAGES, tokens=tokens or {})) as bar:

        def report(stage: str, done: int, total: int) -> None:
            bar(stage, done, total)
            page(stage, done, total)

        bar(first, 0, 1)
        yield report
