"""One more check after a run of `watch` during which an event came: nothing that woke a busy watcher is lost."""

from __future__ import annotations

from typing import Any

from prefect import Flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterEndTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.sorting import FlowRunSort

__all__ = ["check_again"]


def check_again(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Start one more check where an event came, and was turned away, while this run held the deployment's only slot.

    A run that is turned away is CANCELLED at once (collision strategy CANCEL_NEW), so that checks do not pile up behind
    a step of hours. The run that holds the slot compares anew after each step, but it does not see what comes between
    its last look and its end. This is a hook that runs after the end, when the slot is free: from then on an event
    starts a run of its own. Checks of the schedule do not count, for the schedule brings the next one.
    """
    if flow_run.deployment_id is None:
        return
    with get_client(sync_client=True) as client:
        turned_away = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(
                deployment_id=FlowRunFilterDeploymentId(any_=[flow_run.deployment_id]),
                state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.CANCELLED])),
                end_time=FlowRunFilterEndTime(after_=client.read_flow_run(flow_run.id).start_time),
            ),
            sort=FlowRunSort.END_TIME_DESC,
        )
        if any(not other.auto_scheduled for other in turned_away):
            client.create_flow_run_from_deployment(
                flow_run.deployment_id, parameters=flow_run.parameters, idempotency_key=f"after {flow_run.id}"
            )
