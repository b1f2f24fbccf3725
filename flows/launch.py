"""Starts a step: as a run of its own on a worker where there is a server that has one, else in this process."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from copal.errors import CopalError
from flows.project import open_project

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State
    from prefect.client.schemas.responses import DeploymentResponse

__all__ = ["AdaptFailedError", "run_adapt"]

_POLL = 2.0  # seconds between two looks at a run
_FLOW = "adapt"
# How Prefect puts an exception into the message of a failed state.
_EXCEPTION = re.compile(r"(?:Flow run encountered an exception:? )?(?P<kind>\w+): (?P<text>.*)", re.DOTALL)


class AdaptFailedError(CopalError):
    """A step that ran on a worker failed, or somebody cancelled it."""


def run_adapt(workspace: str, domain: str, rev: str | None) -> int | None:
    """Run the flow `adapt`, and wait for its end however long it takes.

    With a Prefect server that has a deployment of `adapt` for this workspace (its parameter `workspace`), it runs on a
    worker of that deployment's pool; else in this process.

    Returns:
        The number of the new version; None where the newest version knows this data already.

    Raises:
        MissingDataError: the pointer names data that is nowhere.
        AdaptFailedError: on a worker it failed, crashed or was cancelled; holds the reason.
        CopalError: in this process it failed.
    """
    deployment = _deployment(workspace)
    if deployment is None:
        from flows.adapt import adapt

        return adapt(workspace, domain, rev)
    from prefect.deployments import run_deployment

    before = _newest(workspace, domain)
    run: Any = run_deployment(  # in a thread without an event loop it is the run, not something to await
        deployment.id,
        parameters={"workspace": workspace, "domain": domain, "rev": rev},
        flow_run_name=f"adapt to {domain}",
        poll_interval=_POLL,
        timeout=None,
    )
    _raise_failure(domain, run.state)
    after = _newest(workspace, domain)
    return after if after != before else None


def _deployment(workspace: str) -> DeploymentResponse | None:
    """The deployment of `adapt` for this workspace, on the server that the environment or profile names."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowFilter, FlowFilterName
    from prefect.settings import PREFECT_API_URL

    if PREFECT_API_URL.value() is None:
        return None
    with get_client(sync_client=True) as client:
        found = client.read_deployments(flow_filter=FlowFilter(name=FlowFilterName(any_=[_FLOW])))
    here = Path(workspace).resolve()
    ours = [each for each in found if Path(str(each.parameters.get("workspace"))).resolve() == here]
    return ours[0] if ours else None


def _newest(workspace: str, domain: str) -> int | None:
    """Number of the newest version that was adapted to the domain."""

    versions = open_project(workspace).registry.versions()
    return max((version.number for version in versions if version.tags.get("copal.domain") == domain), default=None)


def _raise_failure(domain: str, state: State | None) -> None:
    from flows.data.dataset import MissingDataError

    if state is None or state.is_completed():
        return
    message = " ".join((state.message or "no reason given").split())
    if state.is_cancelled():
        raise AdaptFailedError(f"{domain}: the step was cancelled")
    found = _EXCEPTION.fullmatch(message) if state.is_failed() else None
    if found is None:
        raise AdaptFailedError(f"{domain}: the step's run is {state.name}: {message}")
    if found["kind"] == MissingDataError.__name__:
        raise MissingDataError(found["text"])
    raise AdaptFailedError(found["text"] if domain in found["text"] else f"{domain}: {found['text']}")
