"""The flow `adapt`: one step of continual pruning, from a dataset version to a registered model version.

The stages themselves are plain functions in `flows.stages`; here they become Prefect tasks, with retries where trying
again can help (fetching over a network, a registry that is busy) and none where it cannot (bad input).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task

from copal.errors import CopalError
from copal.step import StepReport
from flows import stages
from flows.registry import Registry, open_registry
from flows.settings import Settings, load_settings, open_workspace
from flows.stages import Evaluation, Step
from flows.terminal import progress_bar

__all__ = ["adapt", "perplexity_table"]


def _may_pass(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Whether trying again can help: not against what a user has to mend."""
    return not isinstance(state.result(raise_on_failure=False), CopalError)


@task(cache_policy=NO_CACHE, retries=2, retry_delay_seconds=[2, 10], retry_condition_fn=_may_pass)
def fetch(workspace: str, step: Step) -> dict[str, str]:
    """Fetch every domain's data version."""
    return stages.fetch_data(open_workspace(Path(workspace)), step)


@task(cache_policy=NO_CACHE)
def prune(settings: Settings, step: Step, data: str) -> StepReport:
    """One COPAL step; on the GPU where there is one."""
    with progress_bar() as progress:
        return stages.prune_domain(settings, step, data, progress)


@task(cache_policy=NO_CACHE)
def evaluate(
    settings: Settings, registry: Registry, step: Step, report: StepReport, data: dict[str, str]
) -> Evaluation:
    """Perplexity on the new domain before the step and on every domain after it."""
    with progress_bar() as progress:
        return stages.evaluate_step(settings, registry, step, report, data, progress)


@task(cache_policy=NO_CACHE, retries=2, retry_delay_seconds=[2, 10], retry_condition_fn=_may_pass)
def register(settings: Settings, registry: Registry, step: Step, report: StepReport, evaluation: Evaluation) -> int:
    """Register the version: the last thing that happens, it makes it `latest`."""
    with progress_bar() as progress:
        return stages.register_step(settings, registry, step, report, evaluation, progress).number


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
        CopalError: what a user has to mend; nothing was registered and nothing is left behind.
    """
    work = open_workspace(Path(workspace))
    settings = load_settings(work.params)
    registry = open_registry(work, settings)
    with stages.exclusive(work):
        step = stages.resolve(work, settings, registry, domain, rev)
        if step is None:
            return None
        try:
            data = fetch(workspace, step)
            device = "gpu" if stages.has_gpu() else "cpu"
            report = prune.with_options(tags=[device], task_run_name=f"prune on {device}")(settings, step, data[domain])
            evaluation = evaluate(settings, registry, step, report, data)
            number = register(settings, registry, step, report, evaluation)
        except BaseException:
            stages.discard(step)
            raise
    create_markdown_artifact(
        key="perplexity",
        markdown=perplexity_table(number, report, evaluation),
        description=f"{settings.model.name} version {number}: perplexity by domain",
    )
    return number


def perplexity_table(number: int, report: StepReport, evaluation: Evaluation) -> str:
    """The new version's figures as a markdown table: a row a domain."""
    rows = [
        f"| {domain.name} | {evaluation.dense[domain.name]:.2f} | {evaluation.perplexity[domain.name]:.2f} "
        f"| {evaluation.perplexity[domain.name] / evaluation.dense[domain.name]:.3f} | `{domain.dvc_md5}` |"
        for domain in evaluation.domains
    ]
    return "\n".join(
        [
            f"## Version {number}",
            f"Sparsity as counted {report.sparsity:.4f}; {report.weights_back:,} weights came back; "
            f"the new domain before the step: perplexity {evaluation.before:.2f}.",
            *([f"Few tokens of the new domain reach {len(report.short)} linears of experts."] if report.short else []),
            "",
            "| domain | dense | this version | ratio | data |",
            "|---|---|---|---|---|",
            *rows,
        ]
    )
