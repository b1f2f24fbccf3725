"""`copal doctor` on the stores: each is reachable, knows us, lets us write, and has a clock and a version like ours."""

from __future__ import annotations

from typing import TYPE_CHECKING

from copal.errors import one_line
from flows.cli.checks import Check, package
from flows.settings import Settings
from flows.uris import is_server, without_secrets
from flows.workspace import Workspace

if TYPE_CHECKING:
    from flows.registry.probe import ServerReport

__all__ = ["artifacts", "ledger", "mlflow", "prefect"]

_SLOW = 0.3  # seconds of a request, in which a password may have been hashed
_SKEW = 30.0  # seconds


def mlflow(workspace: Workspace | None, settings: Settings) -> Check:
    """The registry, and where it is a server, that server."""
    check = package("mlflow")
    if not check.ok or workspace is None:
        return check
    from flows.project import project_of
    from flows.registry.probe import ask_server

    uri = workspace.registry_uri(settings)
    said, advice = "", ""
    if is_server(uri):
        report = ask_server(uri)
        said, advice = f"; {_of_server(report)}", "; ".join(_advice(report))
    head = project_of(workspace, settings).registry.head()
    store = without_secrets(uri)
    if head is None:
        return Check(
            name="mlflow",
            ok=None,
            found=f"{check.found}, no version of {settings.model.name} in {store}{said}",
            advice=f"register a base model: copal init {workspace.root} --base SOURCE",
        )
    found = f"{check.found}, newest is version {head.number} of {settings.model.name} in {store}{said}"
    return Check(name="mlflow", ok=None if advice else True, found=found, advice=advice)


def _of_server(report: ServerReport) -> str:
    user = f"takes us for {report.user}" if report.user else "asks nobody who he is"
    return f"it is MLflow {report.version}, {user}, answers in {report.seconds:.2f} s"


def _advice(report: ServerReport) -> list[str]:
    found = []
    if report.version.split(".")[:2] != report.client.split(".")[:2]:
        found.append(
            f"server and client differ ({report.version}, {report.client}): install one minor version of MLflow"
        )
    if report.user and report.seconds > _SLOW:
        found.append("it seems to hash the password at each request: set auth_cache_ttl_seconds = 60 in its auth.ini")
    if abs(report.skew) > _SKEW:
        found.append(f"its clock is {report.skew:+.0f} s from ours: set both by NTP")
    return found


def artifacts(workspace: Workspace | None, settings: Settings) -> Check:
    """Whether files can be stored where versions are."""
    if workspace is None:
        return Check(name="artifacts", ok=True, found="in the workspace, unless registry.artifacts names another place")
    from flows.project import project_of

    place = project_of(workspace, settings).registry.try_artifacts()
    wanted = workspace.artifact_location(settings)
    if place is None:
        to = "where the MLflow server says" if wanted is None else without_secrets(wanted)
        return Check(name="artifacts", ok=True, found=f"those of {settings.model.name} will go {to}")
    found = f"a file could be stored in {without_secrets(place)}, and deleted"
    if settings.registry.artifacts is not None and wanted is not None and not place.startswith(wanted.rstrip("/")):
        return Check(
            name="artifacts",
            ok=None,
            found=f"{found}; registry.artifacts names {without_secrets(wanted)}",
            advice="a lineage stays where it began: the setting is for new ones (another model.name)",
        )
    return Check(name="artifacts", ok=True, found=found)


def ledger(workspace: Workspace | None, settings: Settings) -> Check:
    """The database of claims and log."""
    if workspace is None:
        return Check(
            name="ledger", ok=True, found="claims and log: in the workspace, unless ledger.uri names a database"
        )
    from flows.ledger import Ledger

    opened = Ledger(workspace.ledger_uri(settings), settings.model.name)
    entries, access = opened.log(), opened.access()
    found = f"{len(entries)} log entries of {settings.model.name} in {without_secrets(opened.uri)}"
    if access is None:
        return Check(name="ledger", ok=True, found=found)
    if not access.may_write:
        return Check(
            name="ledger",
            ok=None,
            found=f"{found}, which we may only read",
            advice="who takes steps, promotes or withdraws needs INSERT and UPDATE there; to look, this is enough",
        )
    if abs(access.skew) > _SKEW:
        advice = "claims go by the database's clock, and records by ours: set both by NTP"
        return Check(
            name="ledger", ok=None, found=f"{found}; its clock is {access.skew:+.0f} s from ours", advice=advice
        )
    return Check(name="ledger", ok=True, found=f"{found}, which we may write")


def prefect() -> Check:
    """The Prefect server, where one is named."""
    check = package("prefect")
    if not check.ok:
        return check
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    address = PREFECT_API_URL.value()
    if not address:
        return Check(name="prefect", ok=True, found=f"{check.found}, no server is named: steps run in the command")
    import httpx

    shown = f"{check.found}, the server {without_secrets(address)}"
    try:
        with (
            temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
            get_client(httpx_settings={"timeout": 5}, sync_client=True) as client,
        ):
            there = client.api_version()
            pools = {pool.name: str(pool.status) for pool in client.read_work_pools()}
    except httpx.HTTPStatusError as error:
        return Check(
            name="prefect",
            ok=False,
            found=f"{shown} does not know us (HTTP {error.response.status_code})",
            advice="set PREFECT_API_AUTH_STRING; in a workspace where `copal up` runs, `set -a; . .copal/stack.env`",
        )
    except (httpx.HTTPError, ValueError) as error:
        return Check(
            name="prefect",
            ok=False,
            found=f"{shown} does not answer ({one_line(error)})",
            advice="start it, or unset PREFECT_API_URL to do without one",
        )
    listed = ", ".join(f"{name} ({status.rpartition('.')[2].lower()})" for name, status in sorted(pools.items()))
    said = f"{shown} answers, version {there}, work pools: {listed or 'none'}"
    return Check(name="prefect", ok=True, found=said)
