"""What `copal up` asks of a Prefect server, through Prefect's own client."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from copal.errors import CopalError, first_line

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

__all__ = [
    "GPU_POOL",
    "POOLS",
    "UpError",
    "answers",
    "client_settings",
    "create_pools",
    "has_worker",
    "settle_old_runs",
]


GPU_POOL = "copal-gpu"


POOLS = ("copal-cpu", GPU_POOL)


_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class UpError(CopalError):
    """The servers and workers of a workspace cannot start, or one of them ended."""


def client_settings(url: str) -> dict[str, bool]:
    """Settings of httpx for a server at `url`: what listens on this machine is not asked for through a user's proxy."""
    return {"trust_env": urlsplit(url).hostname not in _LOOPBACK}


def create_pools(
    api: str, auth: str | None, kind: str = "process", templates: Mapping[str, dict[str, Any]] | None = None
) -> None:
    """Create the work pools that are not there, and give those that are the templates named here.

    Args:
        kind: Prefect's type of the pools.
        templates: pool -> its base job template; without one the worker fills in what jobs of its type can be told.

    Raises:
        UpError: a pool is there and of another type; the server does not answer or refuses.
    """
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate

    with _client(api, auth) as client:
        there = {pool.name: pool for pool in client.read_work_pools()}
        for name in POOLS:
            template = (templates or {}).get(name, {})
            if name not in there:
                client.create_work_pool(WorkPoolCreate(name=name, type=kind, base_job_template=template))
            elif there[name].type != kind:
                raise UpError(
                    f"the work pool {name} is of the type {there[name].type}, not {kind}: delete it "
                    f"(`prefect work-pool delete {name}`) and run this again"
                )
            elif template and template != there[name].base_job_template:
                client.update_work_pool(name, WorkPoolUpdate(base_job_template=template))


def settle_old_runs(api: str, auth: str, workspace: str) -> None:
    """Set runs whose processes ended with an earlier server CRASHED, and delete scheduled checks that are overdue and
    all that waits for another folder than this workspace's: it was copied from there, or moved.
    """
    from prefect.client.schemas.filters import (
        FlowRunFilter,
        FlowRunFilterExpectedStartTime,
        FlowRunFilterState,
        FlowRunFilterStateType,
        WorkPoolFilter,
        WorkPoolFilterName,
    )
    from prefect.client.schemas.objects import State, StateType
    from prefect.states import Crashed

    ours = WorkPoolFilter(name=WorkPoolFilterName(any_=list(POOLS)))

    def of(*types: StateType) -> FlowRunFilterState:
        return FlowRunFilterState(type=FlowRunFilterStateType(any_=list(types)))

    lost = FlowRunFilter(state=of(StateType.RUNNING, StateType.PENDING, StateType.CANCELLING))
    before_now = FlowRunFilterExpectedStartTime.model_validate({"before_": datetime.now(UTC)})
    waiting = FlowRunFilter(state=of(StateType.SCHEDULED))
    late = FlowRunFilter(state=of(StateType.SCHEDULED), expected_start_time=before_now)
    with _client(api, auth) as client:
        for run in client.read_flow_runs(flow_run_filter=lost, work_pool_filter=ours):
            ended: State[Any] = Crashed(message="The machine or `copal up` ended while this ran.")
            client.set_flow_run_state(run.id, ended, force=True)
        for run in client.read_flow_runs(flow_run_filter=waiting, work_pool_filter=ours):
            if run.parameters.get("workspace", workspace) != workspace:
                client.delete_flow_run(run.id)
        for run in client.read_flow_runs(flow_run_filter=late, work_pool_filter=ours):
            if run.auto_scheduled:
                client.delete_flow_run(run.id)


def has_worker(api: str, auth: str, pool: str) -> bool:
    """Whether a worker has ever asked for runs of the pool."""
    with _client(api, auth) as client:
        return bool(client.read_workers_for_work_pool(pool))


def answers(url: str) -> bool:
    """Whether a server on this machine, Prefect's or MLflow's, answers 200 at `url`."""
    import httpx

    try:
        return httpx.get(url, timeout=5, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


@contextmanager
def _client(api: str, auth: str | None) -> Iterator[SyncPrefectClient]:
    """A client of the server at `api`, let in by `auth`. It tries again where the server's database is busy."""
    import httpx
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.exceptions import PrefectException

    try:
        with SyncPrefectClient(api, auth_string=auth, httpx_settings=client_settings(api)) as client:
            yield client
    except (httpx.HTTPError, PrefectException, RuntimeError) as error:
        raise UpError(f"the Prefect server at {api} refuses: {first_line(error)}") from error
