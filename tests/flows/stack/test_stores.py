"""Each store is killed in each phase of a step and comes back: the next run makes one version, and nothing is lost."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_API_URL,
    PREFECT_CLIENT_MAX_RETRIES,
    temporary_settings,
)

from copal.errors import CopalError
from flows.adapt import adapt
from flows.runs.server import on_server
from flows.step import run
from flows.workspace import open_workspace
from support.benches import PARAMS, Bench
from support.buckets import S3Server
from support.ledgers import expire
from support.servers import MlflowServer, PostgresServer, PrefectServer
from support.toys import step

pytestmark = [pytest.mark.team, pytest.mark.slow]

PHASES = {
    "fetch": "fetch_data",
    "prune": "prune_domain",
    "evaluate": "evaluate_step",
    "register": "register_step",
    "upload": "log_model_artifacts",
    "gates": "run_gates",
}
STORES = ("postgresql", "mlflow", "s3", "prefect")
# Each store once, in another phase; `make soak` takes the others.
OFTEN = {("postgresql", "upload"), ("mlflow", "gates"), ("s3", "register"), ("prefect", "evaluate")}
CASES = [
    pytest.param(store, phase, marks=() if (store, phase) in OFTEN else pytest.mark.soak)
    for store in STORES
    for phase in PHASES
]


@dataclass(frozen=True)
class Servers:
    """MLflow's metadata, the ledger and Prefect's runs are on PostgreSQL; the files of versions on S3."""

    postgresql: PostgresServer
    mlflow: MlflowServer
    s3: S3Server
    prefect: PrefectServer


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory, postgresql: PostgresServer) -> Iterator[Servers]:
    folder = tmp_path_factory.mktemp("servers")
    for name in ("mlflow", "prefect"):
        (folder / name).mkdir()
    database = postgresql.uri(postgresql.new_database()).replace("psycopg2", "asyncpg")
    found = Servers(
        postgresql,
        MlflowServer(folder / "mlflow", postgresql.uri(postgresql.new_database())),
        S3Server(),
        PrefectServer(folder / "prefect", database, "copal:x"),
    )
    try:
        for server in (found.mlflow, found.s3, found.prefect):
            server.start()
        found.s3.new_bucket("copal")
        yield found
    finally:
        for server in (found.prefect, found.s3, found.mlflow):
            server.kill()


@pytest.fixture
def shared(
    servers: Servers, template: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: Any
) -> Bench:
    """A lineage of its own with its base and one dataset, on these stores."""
    name = f"{request.node.callspec.params['store']}-{request.node.callspec.params['phase']}"
    for variable, value in {
        "COPAL_REGISTRY_URI": servers.mlflow.uri,
        "COPAL_REGISTRY_ARTIFACTS": f"s3://copal/{name}",
        "AWS_MAX_ATTEMPTS": "1",
        **servers.s3.environment,
        "COPAL_LEDGER_URI": servers.postgresql.uri(servers.postgresql.new_database()),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # else a step waits for minutes, and outlives what is short
    }.items():
        monkeypatch.setenv(variable, value)
    shutil.copytree(template, tmp_path / "workspace")
    bench = Bench(open_workspace(tmp_path / "workspace"), tiny_base)
    bench.workspace.params.write_text(PARAMS.replace("tiny", name) + "gates: {dense: null, promote: manual}\n")
    bench.register_root()
    bench.commit("code", 0)
    return bench


@pytest.mark.parametrize(("store", "phase"), CASES)
def test_a_store_that_is_killed_in_a_step_and_comes_back(shared, servers, store, phase, monkeypatch):
    server = getattr(servers, store)
    killed: list[str] = []

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not killed:
                killed.append(phase)
                server.kill()
            return real(*args, **kwargs)

        return call

    known = {
        PREFECT_API_URL: servers.prefect.api,
        PREFECT_API_AUTH_STRING: servers.prefect.auth,
        PREFECT_CLIENT_MAX_RETRIES: 0,
    }

    def take() -> Any:
        if store != "prefect":
            return step(shared)
        with temporary_settings(known), on_server():
            return adapt(str(shared.root), "code")

    owner = MlflowClient if phase == "upload" else run
    with monkeypatch.context() as patch:
        patch.setattr(owner, PHASES[phase], dying(getattr(owner, PHASES[phase])))
        said = "it went on"
        try:
            take()
        except CopalError as error:
            said = str(error)
    assert said.count("\n") == 0
    assert killed == [phase]
    server.start()
    expire(shared.project.ledger.uri)  # where nobody could free the lineage
    take()
    assert [version.tags.get("copal.domain") for version in shared.registry.versions()] == [None, "code"]
    assert [entry.kind for entry in shared.log] == ["gates"], "its chain is whole"
    assert step(shared) is None
    assert list(shared.workspace.runs.iterdir()) == []
    client = MlflowClient(tracking_uri=servers.mlflow.uri, registry_uri=servers.mlflow.uri)
    everything = client.search_model_versions(f"name = '{shared.registry.model_name}'")
    assert sorted(int(version.version) for version in everything) == [1, 2]
    experiment = client.get_experiment_by_name(shared.registry.model_name)
    assert client.search_runs([experiment.experiment_id], "attributes.status = 'RUNNING'") == []
