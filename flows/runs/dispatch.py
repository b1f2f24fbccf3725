"""A step as a run of its own, on a worker of the workspace's deployment of `adapt`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import TERMINAL_STATES
from prefect.client.schemas.sorting import FlowRunSort
from prefect.deployments import run_deployment
from prefect.exceptions import PrefectException
from prefect.settings import PREFECT_API_URL
from prefect.states import Crashed

from copal.errors import CopalError
from flows.data.clones import is_url
from flows.data.dataset import MissingDataError
from flows.runs.names import adapt_name

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun, State, WorkPool
    from prefect.client.schemas.responses import DeploymentResponse

__all__ = [
    "AdaptFailedError",
    "adapt_deployment",
    "adapt_on_worker",
    "outcome",
    "pool_of",
    "start_run",
    "wait_for_end",
]

_FLOW = "adapt"
_POLL = 2.0  # seconds between two looks at a run


class AdaptFailedError(CopalError):
    """A step that ran on a worker crashed, was cancelled, or its result cannot be read."""


def adapt_deployment(workspace: str) -> DeploymentResponse | None:
    """The deployment of `adapt` for this workspace, on the server that the environment or profile names."""
    if PREFECT_API_URL.value() is None:
        return None
    with get_client(sync_client=True) as client:
        found = client.read_deployments(flow_filter=FlowFilter(name=FlowFilterName(any_=[_FLOW])))
    here = _place(workspace)
    ours = [each for each in found if _place(str(each.parameters.get("workspace"))) == here]
    return ours[0] if ours else None


def _place(workspace: str) -> str:
    return workspace if is_url(workspace) else str(Path(workspace).resolve())


def pool_of(deployment: DeploymentResponse) -> WorkPool | None:
    """The work pool that the deployment's runs go to; None where it has none."""
    if deployment.work_pool_name is None:
        return None
    with get_client(sync_client=True) as client:
        return client.read_work_pool(deployment.work_pool_name)


def adapt_on_worker(
    deployment: DeploymentResponse,
    workspace: str,
    domain: str,
    rev: str | None,
    key: str,
    registered: Callable[[], int | None],
    variables: Mapping[str, Any] | None = None,
) -> int | None:
    """Run the step that `key` names on a worker, and wait for its end however long it takes.

    Where a run of this step waits or runs already, it is the one that is waited for.

    Args:
        registered: tells which version the step has made, where the run's own result lies on another machine.
        variables: job variables of this run, which go before those of deployment and pool.

    Returns:
        What the flow gives: the number of the new version; None where the newest version knows this data already.

    Raises:
        CopalError: that the flow raised, as it raised it.
        AdaptFailedError: it failed in another way, crashed or was cancelled; holds the reason.
    """
    with get_client(sync_client=True) as client:
        parameters = {"workspace": workspace, "domain": domain, "rev": rev}
        run = start_run(client, deployment.id, adapt_name(domain, rev), parameters, key, variables)
        return outcome(domain, wait_for_end(client, deployment.id, run.id), registered)


def start_run(
    client: SyncPrefectClient,
    deployment: UUID,
    name: str,
    parameters: dict[str, Any],
    key: str,
    variables: Mapping[str, Any] | None = None,
) -> FlowRun:
    """The one run of the deployment for the step that `key` names: one that has not ended yet, or a new one.

    The server makes one run of a flow for one idempotency key, for good. So the key names the deployment, for other
    workspaces have theirs; and a step whose last run has ended goes on under a key that names that run: whoever comes
    to it at the same time gets the same new run.

    Args:
        key: of the step, with the name of its lineage.
        variables: job variables of a new run.
    """
    tag, key = f"step:{key}", f"{deployment} {key}"
    ended = client.read_flow_runs(
        flow_run_filter=FlowRunFilter(
            deployment_id=FlowRunFilterDeploymentId(any_=[deployment]),
            tags=FlowRunFilterTags(all_=[tag]),
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=sorted(TERMINAL_STATES))),
        ),
        sort=FlowRunSort.END_TIME_DESC,
        limit=1,
    )
    last = ended[0] if ended else None
    while True:
        # In a thread without an event loop this is the run, not something to await.
        run = cast(
            "FlowRun",
            run_deployment(
                deployment,
                parameters=parameters,
                flow_run_name=name,
                tags=[tag],
                idempotency_key=key if last is None else f"{key} after {last.id}",
                timeout=0,
                job_variables=dict(variables or {}),
            ),
        )
        if run.state is None or not run.state.is_final():
            return run
        last = run  # it has ended meanwhile


def wait_for_end(client: SyncPrefectClient, deployment: UUID, run_id: UUID, poll: float = _POLL) -> State[Any]:
    """The last state of a run.

    A run whose machine was switched off stays RUNNING for ever. Such a run shows by its slot of the deployment's limit:
    no process renews it, and the server takes it back. The run is then set CRASHED, so that the step can start again.
    """
    running = False
    while True:
        lost = running and not _holds_slot(client, deployment)
        run = client.read_flow_run(run_id)
        state = run.state
        if state is not None and state.is_final():
            return state
        running = state is not None and state.is_running()
        if lost and running:
            message = "Its process does not renew its slot of the deployment's limit: the machine or worker ended."
            client.set_flow_run_state(run_id, Crashed(message=message), force=True)
            continue
        time.sleep(poll)


def _holds_slot(client: SyncPrefectClient, deployment: UUID) -> bool:
    limit = client.read_deployment(deployment).global_concurrency_limit
    return limit is None or limit.active_slots > 0  # without a limit nobody can tell


def outcome(domain: str, state: State[Any], registered: Callable[[], int | None]) -> int | None:
    """What the run with this last state gives; raises what it raised.

    Workers and watcher need share no storage for results: then the registry knows the version, and of an error what
    Prefect says of it.

    Raises:
        CopalError, AdaptFailedError: see `adapt_on_worker`.
    """
    if state.is_cancelled():
        raise AdaptFailedError(f"{domain}: the step was cancelled")
    reason = " ".join((state.message or "no reason given").split())
    try:
        result = state.result(raise_on_failure=False)
    except (OSError, ValueError, TypeError, PrefectException) as error:
        if state.is_completed():
            return registered()
        _, missing, said = reason.partition(f"{MissingDataError.__name__}: ")
        if missing:  # to be looked for again, which is no failure
            raise MissingDataError(said) from error
        raise AdaptFailedError(f"{domain}: the step's run is {state.name}: {reason}") from error
    if isinstance(result, CopalError):
        raise result
    if isinstance(result, BaseException):
        raise AdaptFailedError(f"{domain}: the step's run is {state.name}: {reason}") from result
    return None if result is None else int(result)
