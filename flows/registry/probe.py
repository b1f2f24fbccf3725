"""What a look at an MLflow server finds: its version, who it takes us for, how quick it is, whether it takes files."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib.metadata import version as installed_version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from flows.registry.errors import RegistryError
from flows.uris import cause, without_secrets

if TYPE_CHECKING:
    from flows.registry.store import Store

__all__ = ["ServerReport", "ask_server", "try_artifacts"]

_WAIT = 5  # seconds
_CURRENT_USER = "/api/2.0/mlflow/users/current"
_EXPERIMENTS = "/api/2.0/mlflow/experiments/search?max_results=1"


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerReport:
    """What an MLflow server said of itself.

    Attributes:
        version: of MLflow there; `client`: here.
        user: that it takes us for; None where it asks nobody who he is.
        seconds: the quickest of three requests.
        skew: seconds that its clock is ahead of ours.
    """

    version: str
    client: str
    user: str | None
    seconds: float
    skew: float


def ask_server(uri: str) -> ServerReport:
    """Ask the MLflow server at an http(s) URI, as MLflow's own client would.

    Raises:
        RegistryError: it does not answer, or does not know us.
    """
    import requests
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    def get(path: str) -> requests.Response:
        answer = http_request(get_default_host_creds(uri), path, "GET", max_retries=0, timeout=_WAIT)
        assert isinstance(answer, requests.Response)
        return answer

    shown = without_secrets(uri)
    try:
        version = get("/version").text.strip()
        times = []
        for _ in range(3):
            began = time.monotonic()
            answer = get(_EXPERIMENTS)
            times.append(time.monotonic() - began)
        if answer.status_code in (401, 403):
            raise RegistryError(
                f"the MLflow server at {shown} does not know us (HTTP {answer.status_code}): set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            )
        current = get(_CURRENT_USER)
    except (MlflowException, requests.exceptions.RequestException) as error:
        raise RegistryError(f"the MLflow server at {shown} does not answer within {_WAIT} s: start it") from cause(
            error
        )
    user = current.json()["user"]["username"] if current.status_code == 200 else None
    there = parsedate_to_datetime(answer.headers["Date"]) if "Date" in answer.headers else datetime.now(UTC)
    return ServerReport(
        version=version,
        client=installed_version("mlflow"),
        user=user,
        seconds=min(times),
        skew=(there - datetime.now(UTC)).total_seconds(),
    )


def try_artifacts(store: Store) -> str | None:
    """Store a file of a few bytes where the lineage's artifacts go, and delete it.

    Returns:
        The place; None where the lineage has not begun, and so has none.

    Raises:
        RegistryError: it cannot be stored, or not be deleted.
    """
    with store.client() as client:
        experiment = client.get_experiment_by_name(store.model_name)
        if experiment is None:
            return None
        place = f"{experiment.artifact_location.rstrip('/')}/copal-doctor-{uuid.uuid4().hex[:8]}"
        with TemporaryDirectory() as folder:
            (Path(folder) / "file").write_text("copal doctor: delete me\n")
            store.upload(place, Path(folder))
        store.artifacts(place).delete_artifacts()
        return str(experiment.artifact_location)
