"""A step on Kubernetes, as the watcher submits it: a real worker of Prefect's makes the job, and its command runs."""

from __future__ import annotations

import json
import os
import sys
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from flows.project import open_project
from flows.runs.dispatch import adapt_deployment, pool_of
from flows.runs.sizing import pod_variables
from flows.stack.team import read_team
from flows.stack.team import set_up as set_up_team
from support.benches import Bench
from support.teams import Host, Stores, publish, shared_workspace
from support.waiting import until

pytestmark = [pytest.mark.team, pytest.mark.slow]

ROOT = Path(__file__).parents[3]
WORK = "/srv/copal"
KUBERNETES = ROOT / "infra" / "kubernetes"
SECRET = "PREFECT_INTEGRATIONS_KUBERNETES_WORKER_API_AUTH_STRING_SECRET"
# As in infra/kubernetes/base/workers.yaml.
WORKER = ("worker", "start", "--pool", "copal-gpu", "--type", "kubernetes", "--install-policy", "never")
SETTINGS = {
    f"{SECRET}_NAME": "copal-prefect",
    f"{SECRET}_KEY": "auth-string",
    "PREFECT_INTEGRATIONS_KUBERNETES_CLUSTER_UID": "copal",
    "PREFECT_INTEGRATIONS_KUBERNETES_OBSERVER_ENABLED": "false",  # it wants more of the API than kmock has
}


@pytest.fixture
def workspace(
    stores: Stores, template: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Stores, Bench]]:
    """A lineage of its own, and this process as a worker of the team's."""
    own = replace(stores, name="kube")
    for name, value in own.variables("worker").items():
        monkeypatch.setenv(name, value)
    server = {PREFECT_API_URL: own.prefect.api, PREFECT_API_AUTH_STRING: own.prefect.auth}
    with temporary_settings(server):
        yield own, shared_workspace(own, tmp_path / "made", "kube", template, tiny_base)


def test_a_step_runs_as_the_job_that_a_worker_makes(workspace, tmp_path):
    pytest.importorskip("kmock", reason="the API of Kubernetes is kmock's: pip install 'kmock>=0.8,<0.9'")
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    from support.clusters import Cluster, started_cluster

    stores, bench = workspace
    bench.commit("code", 0)
    publish(bench)
    here = stores.variables("worker")
    place = here.pop("COPAL_WORKSPACE")
    secrets = {
        "copal-mlflow-users": {"worker-password": here.pop("MLFLOW_TRACKING_PASSWORD")},
        "copal-prefect": {"auth-string": here.pop("PREFECT_API_AUTH_STRING")},
        "copal-ledger": {"password": "a secret of the ledger"},
        "copal-s3-worker": {
            "access-key": here.pop("AWS_ACCESS_KEY_ID"),
            "secret-key": here.pop("AWS_SECRET_ACCESS_KEY"),
        },
    }
    here["COPAL_LEDGER_URI"] = here["COPAL_LEDGER_URI"].replace(":a-secret@", "@")  # it is in PGPASSWORD
    cluster = Cluster(
        tmp_path / "cluster",
        {
            "configMapRef": {"copal-addresses": here, "copal-workspace": {"COPAL_WORKSPACE": place}},
            "secretKeyRef": secrets,
        },
        {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COPAL_HOME": WORK, "PYTHONSAFEPATH": "1"}
        | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    cluster.folder.mkdir()
    set_up(stores, place)
    let_in = {name: stores.variables("worker")[name] for name in ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING")}
    worker = Host(tmp_path / "worker", SETTINGS | let_in | {"KUBECONFIG": str(cluster.config)})
    watcher = Host(tmp_path / "watcher", stores.variables("worker"))
    for host in (worker, watcher):
        host.folder.mkdir()
    project = open_project(bench.root)
    head, deployment = project.registry.head(), adapt_deployment(place)
    assert head is not None
    assert deployment is not None
    pool = pool_of(deployment)
    assert pool is not None
    size = pod_variables(project, head, "code", pool, {})

    stranger = Host(watcher.folder, watcher.variables | {"PREFECT_API_AUTH_STRING": "copal:a guess"})
    said = stranger.copal("watch", "--once", status=2)
    assert said.startswith(
        f"copal: the Prefect server at {stores.prefect.api} does not let us in (HTTP 401): set PREFECT_"
    )
    assert said.count("\n") == 1
    said += stranger.copal("adapt", "code", status=2)

    with started_cluster(cluster):
        processes = [worker.start("prefect", *WORKER), watcher.start("flows.cli", "watch", "--once")]
        failed = False
        try:  # nobody tells the watcher of a container that failed
            until(lambda: processes[1].poll() is not None or any(status for status, _ in cluster.ended), 600, "the end")
            failed = processes[1].poll() != 0
            until(lambda: failed or cluster.ended, 60, "the end of the container, which tells its result before")
        finally:
            for process in processes:
                process.terminate()
                said += "".join(process.communicate())
    assert not failed, (said, cluster.ended)
    (job,), ((status, container),) = cluster.jobs, cluster.ended
    assert status == 0, container
    assert [version.tags.get("copal.domain") for version in bench.registry.versions()] == [None, "code"]

    kubernetes_validate.validate(job, "1.34", strict=True)
    assert size.keys() == {"memory", "scratch", "gpus", "nodes"}
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == size["nodes"] == 1
    (limits,) = [each["resources"]["limits"] for each in job["spec"]["template"]["spec"]["containers"]]
    assert limits == {
        "memory": size["memory"], "ephemeral-storage": size["scratch"], "nvidia.com/gpu": size["gpus"],
    }  # fmt: skip

    dumps = [stores.postgresql.dump(name) for name in (stores.prefect.database, stores.database)]
    files = [path for folder in (stores.folder, tmp_path) for path in folder.rglob("*") if path.is_file()]
    texts = [
        json.dumps(job).encode(),
        said.encode(),
        container.encode(),
        *dumps,
        *(path.read_bytes() for path in files),
    ]
    assert sum(b"adapt code" in text for text in texts) > 1, "runs and logs are among them"
    for secret in (value for held in secrets.values() for value in held.values()):
        for shape in (secret.encode(), b64encode(secret.encode())):
            assert [text[:200] for text in texts if shape in text] == []


def set_up(stores: Stores, place: str) -> None:
    """Pools of Kubernetes and deployments, as the setup of infra/kubernetes makes them."""
    variables = {
        "PREFECT_API_URL": stores.prefect.api,
        "PREFECT_API_AUTH_STRING": stores.prefect.auth,
        "COPAL_WORKSPACE": place,
        "COPAL_POOL_TYPE": "kubernetes",
        "COPAL_JOB_TEMPLATE": str(KUBERNETES / "base" / "job-template.json"),
        "COPAL_JOB_DEFAULTS": str(KUBERNETES / "overlays" / "cpu" / "pools.json"),
    }
    set_up_team(read_team(variables), lambda line: None)
