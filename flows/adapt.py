"""The flow `adapt`: one step of continual pruning, from a dataset version to a registered model version. The flow
`withdraw` is the same step in the other direction.

The stages themselves are plain functions in `flows.step.work`; here they become Prefect tasks, with retries where
trying again can help (fetching over a network, a registry that is busy) and none where it cannot (bad input).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task
from prefect.utilities.timeout import timeout

from copal.errors import CopalError
from copal.step import StepReport
from flows.gates.judge import GateResult, as_table, failed
from flows.gates.run import run_gates
from flows.ledger import Claim
from flows.machine import has_gpu
from flows.project import Project, open_project
from flows.registry.versions import ModelVersion
from flows.step.register import register_step
from flows.step.resolve import Step
from flows.step.run import Made, Tasks, Withdrawal, run_step, run_withdrawal
from flows.step.staging import Evaluation
from flows.step.work import evaluate_step, fetch_data, prune_domain
from flows.terminal.progress import progress_bar

__all__ = ["TimeLimitError", "adapt", "perplexity_table", "time_limit", "withdraw"]


class TimeLimitError(CopalError):
    """A step took longer than the settings allow."""


class _OutOfTimeError(TimeoutError):
    """Tells our limit from another library's."""


def _may_pass(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Whether trying again can help: not against what a user has to mend."""
    return not isinstance(state.result(raise_on_failure=False), CopalError)


@task(cache_policy=NO_CACHE, retries=2, retry_delay_seconds=[2, 10], retry_condition_fn=_may_pass)
def fetch(project: Project, step: Step) -> dict[str, str]:
    """Fetch every domain's data version."""
    return fetch_data(project, step)


@task(cache_policy=NO_CACHE)
def prune(project: Project, step: Step, data: str | None, claim: Claim) -> StepReport:
    """One COPAL step; on the GPU where there is one."""
    with progress_bar() as progress:
        return prune_domain(project.settings, step, data, claim.guard(progress))


@task(cache_policy=NO_CACHE)
def evaluate(project: Project, step: Step, report: StepReport, data: Mapping[str, str], claim: Claim) -> Evaluation:
    """Perplexity on the new domain before the step and on every domain after it."""
    with progress_bar() as progress:
        return evaluate_step(project, step, report, data, claim.guard(progress))


@task(cache_policy=NO_CACHE, retries=2, retry_delay_seconds=[2, 10], retry_condition_fn=_may_pass)
def register(project: Project, step: Step, report: StepReport, evaluation: Evaluation, claim: Claim) -> ModelVersion:
    """Register the version: the last thing that happens, it makes it `latest`."""
    with progress_bar() as progress:
        return register_step(project, step, report, evaluation, claim.seal, progress)


@task(cache_policy=NO_CACHE, retries=2, retry_delay_seconds=[2, 10], retry_condition_fn=_may_pass)
def gates(project: Project, version: ModelVersion, claim: Claim) -> tuple[GateResult, ...]:
    """Run the gates of the registered version and move the aliases that they move."""
    results = run_gates(project, version, claim, print)
    create_markdown_artifact(
        key="gates",
        markdown=as_table(version.number, results),
        description=f"{project.name} version {version.number}: "
        + (f"{len(failed(results))} gates failed" if failed(results) else "passed its gates"),
    )
    return results


@flow(name="adapt", flow_run_name="adapt to {domain}", validate_parameters=False)
def adapt(workspace: str, domain: str, rev: str | None = None) -> int | None:
    """Adapt the newest model version to a dataset version, and register what comes out.

    Args:
        workspace: the folder of the workspace.
        domain: the folder under data/.
        rev: the revision at which its data is wanted; None: the watched branch.

    Returns:
        The number of the new version; None where the newest version knows this data already.

    Raises:
        CopalError: what a user has to mend; nothing was registered. A version that is pruned waits for the next run,
            and so does one that is registered and has not gone through its gates.
        TimeLimitError: the step took longer than run.time_limit.
    """
    project = open_project(workspace)
    with time_limit(project.settings.run.time_limit):
        made = run_step(project, domain, rev, _tasks(), tell=print)
    if made is None:
        return None
    _show(project, made)
    return made.number


@flow(name="withdraw", flow_run_name="withdraw {domain}", validate_parameters=False)
def withdraw(workspace: str, domain: str, why: str, purge: bool = False) -> Withdrawal:
    """Make a version as if a domain had never been seen, and register it: see `flows.step.run.run_withdrawal`.

    Raises:
        CopalError: what a user has to mend; nothing was registered. A version that is pruned waits for the next run.
        TimeLimitError: it took longer than run.time_limit.
    """
    project = open_project(workspace)
    with time_limit(project.settings.run.time_limit):
        done = run_withdrawal(project, domain, why, _tasks(), purge=purge, tell=print)
    if done.made is not None:
        _show(project, done.made)
    return done


def _tasks() -> Tasks:
    device = "gpu" if has_gpu() else "cpu"
    return Tasks(
        fetch=fetch,
        prune=prune.with_options(tags=[device], task_run_name=f"prune on {device}"),
        evaluate=evaluate,
        register=register,
        gates=gates,
    )


def _show(project: Project, made: Made) -> None:
    create_markdown_artifact(
        key="perplexity",
        markdown=perplexity_table(made.number, made.report, made.evaluation),
        description=f"{project.name} version {made.number}: perplexity by domain",
    )


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """End the `with` after so many seconds; None is never.

    Raises:
        TimeLimitError: it took longer.
    """
    try:
        with timeout(seconds=seconds, timeout_exc_type=_OutOfTimeError):
            yield
    except _OutOfTimeError as error:
        raise TimeLimitError(
            f"the step took longer than run.time_limit, {seconds:g} s, and was stopped; what it has finished stays "
            "for the next run: raise the limit, or give it a faster machine"
        ) from error


def perplexity_table(number: int, report: StepReport, evaluation: Evaluation) -> str:
    """The new version's figures as a markdown table: a row a domain."""
    rows = [
        f"| {domain.name} | {evaluation.dense[domain.name]:.2f} | {evaluation.perplexity[domain.name]:.2f} "
        f"| {evaluation.perplexity[domain.name] / evaluation.dense[domain.name]:.3f} | `{domain.dvc_md5}` |"
        for domain in evaluation.domains
    ]
    before = (
        "" if evaluation.before is None else f"; the new domain before the step: perplexity {evaluation.before:.2f}"
    )
    return "\n".join(
        [
            f"## Version {number}",
            f"Sparsity as counted {report.sparsity:.4f}; {report.weights_back:,} weights came back{before}.",
            *([f"Few tokens of the new domain reach {len(report.short)} linears of experts."] if report.short else []),
            "",
            "| domain | dense | this version | ratio | data |",
            "|---|---|---|---|---|",
            *rows,
        ]
    )
