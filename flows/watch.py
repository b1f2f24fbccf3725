"""The flow `watch`: whatever woke it, it compares the watched branch with the newest version, runs what is pending."""

from __future__ import annotations

from prefect import flow

from flows.gates.judge import GateResult
from flows.ledger import Claim
from flows.pending.take_up import take_up
from flows.project import Project, open_project
from flows.registry.versions import ModelVersion
from flows.runs.again import check_again
from flows.runs.dispatch import adapt_deployment, adapt_on_worker, pool_of
from flows.runs.log import note
from flows.runs.names import watch_run
from flows.runs.sizing import pod_variables
from flows.step.resolve import find_step

__all__ = ["run_adapt", "watch"]


@flow(
    name="watch",
    flow_run_name=watch_run,
    result_serializer="json",
    on_completion=[check_again],
    on_failure=[check_again],
)
def watch(workspace: str) -> list[int]:
    """Run one step for every pending dataset version: see `flows.pending.take_up`."""
    made = take_up(workspace, run_adapt, _run_gates)
    note(f"made version {', '.join(map(str, made))}" if made else "nothing was made")
    return made


def _run_gates(project: Project, version: ModelVersion, claim: Claim) -> tuple[GateResult, ...]:
    from flows.runs.tasks import step_tasks  # torch, which a watcher needs for the gates of a step that was killed

    return step_tasks().gates(project, version, claim)


def run_adapt(workspace: str, domain: str, rev: str | None) -> int | None:
    """Run the flow `adapt`, and wait for its end however long it takes.

    With a Prefect server that has a deployment of `adapt` for this workspace (its parameter `workspace`), it runs on a
    worker of that deployment's pool; else in this process. Where the pool is one of Kubernetes, the step gets a pod
    of its size.

    Returns:
        The number of the new version; None where the newest version knows this data already.

    Raises:
        CopalError: what the flow raised; see also `flows.runs.dispatch.adapt_on_worker`.
    """
    deployment = adapt_deployment(workspace)
    if deployment is None:
        from flows.adapt import adapt  # brings torch, which a watcher with workers does not need

        return adapt(workspace, domain, rev)
    project = open_project(workspace)
    found = find_step(project, domain, rev)
    if found is None:
        return None
    head, _, key = found

    def registered() -> int | None:
        project.registry.refresh()
        return next((version.number for version in project.registry.versions() if version.key == key), None)

    pool = pool_of(deployment)
    variables = pod_variables(project, head, domain, pool, deployment.job_variables) if pool is not None else {}
    return adapt_on_worker(deployment, workspace, domain, rev, f"{project.name} {key}", registered, variables)
