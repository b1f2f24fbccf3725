"""The six tasks of a step as Prefect tasks: with retries where trying again can help (fetching over a network, a
registry that is busy) and none where it cannot (bad input).

The work is done by plain functions in `flows.step` and `flows.gates`. Prefect caches, hashes and stores nothing of it;
tasks take a project and give paths, ids and small values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ParamSpec, TypeVar

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task

from copal.step import StepReport
from flows.gates.judge import GateResult
from flows.ledger import Claim
from flows.machine import has_gpu
from flows.project import Project
from flows.registry.versions import ModelVersion
from flows.runs.artifacts import progress_artifacts, show_gates
from flows.runs.events import tell_gates
from flows.runs.log import tell
from flows.step.resolve import Inputs, Step
from flows.step.retries import PAUSES, may_pass
from flows.step.run import Tasks
from flows.step.staging import Evaluation
from flows.terminal.steps import shown_tasks

__all__ = ["step_tasks"]

_P = ParamSpec("_P")
_R = TypeVar("_R")
_SHOWN = shown_tasks(tell, progress_artifacts)


def _may_pass(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    return may_pass(state.result(raise_on_failure=False))


@task(cache_policy=NO_CACHE, persist_result=False)
def inputs(project: Project, parent: ModelVersion) -> Inputs:
    """Fetch what the step reads of the registry: the dense base, and the newest version with its state."""
    return _SHOWN.inputs(project, parent)


@task(cache_policy=NO_CACHE, persist_result=False)
def fetch(project: Project, step: Step) -> Mapping[str, str]:
    """Fetch every domain's data version."""
    return _SHOWN.fetch(project, step)


@task(cache_policy=NO_CACHE, persist_result=False)
def prune(project: Project, step: Step, data: Mapping[str, str], claim: Claim) -> StepReport:
    """One COPAL step; on the GPU where there is one."""
    return _SHOWN.prune(project, step, data, claim)


@task(cache_policy=NO_CACHE, persist_result=False)
def evaluate(project: Project, step: Step, report: StepReport, data: Mapping[str, str], claim: Claim) -> Evaluation:
    """Perplexity on the new domain before the step and on every domain after it."""
    return _SHOWN.evaluate(project, step, report, data, claim)


@task(cache_policy=NO_CACHE, persist_result=False)
def register(project: Project, step: Step, report: StepReport, evaluation: Evaluation, claim: Claim) -> ModelVersion:
    """Register the version: the last thing that happens, it makes it `latest`."""
    return _SHOWN.register(project, step, report, evaluation, claim)


@task(cache_policy=NO_CACHE, persist_result=False)
def gates(project: Project, version: ModelVersion, claim: Claim) -> tuple[GateResult, ...]:
    """Run the gates of the registered version and move the aliases that they move."""
    results = _SHOWN.gates(project, version, claim)
    show_gates(project.name, version.number, results)
    tell_gates(project.name, version.number, results)
    return results


def _tried_again(once: Task[_P, _R]) -> Task[_P, _R]:
    pauses = list(PAUSES)
    return once.with_options(retries=len(pauses), retry_delay_seconds=pauses, retry_condition_fn=_may_pass)


def step_tasks() -> Tasks:
    """The tasks of a step, tagged with the device that they would use here."""
    device = "gpu" if has_gpu() else "cpu"
    return Tasks(
        inputs=_tried_again(inputs),
        fetch=_tried_again(fetch),
        prune=prune.with_options(tags=[device], task_run_name=f"prune on {device}"),
        evaluate=evaluate,
        register=_tried_again(register),
        gates=_tried_again(gates),
    )
