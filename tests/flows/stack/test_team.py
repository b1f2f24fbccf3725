"""The one-shot setup of a team's servers: MLflow's users and roles on a real server with basic-auth, work pools and
deployments on a real Prefect server, buckets on a real S3 API. Each part is set up twice, for it may be run again."""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import requests

from copal.errors import SettingsError
from flows.stack.buckets import Bucket, ensure_bucket, parse_buckets, policy
from flows.stack.mlflow_users import ROLES, MlflowServer, UsersError, ensure_roles, ensure_user
from flows.stack.prefect_server import POOLS, UpError, create_pools
from flows.stack.team import main, pool_template, read_team
from support import servers
from support.buckets import S3Server

ROOT = Path(__file__).parents[3]
INFRA = ROOT / "infra"
VARIABLES = {
    "PREFECT_API_URL": "http://prefect:4200/api",
    "COPAL_WORKSPACE": "https://git.example/team.git#main",
}


# --- MLflow's users


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, mlflow_template: Path) -> Iterator[MlflowServer]:
    if importlib.util.find_spec("flask_wtf") is None:
        pytest.skip("MLflow's basic-auth needs Flask-WTF: pip install 'mlflow[auth]'")
    folder = tmp_path_factory.mktemp("basic-auth")
    password = "the-administrator's"
    server = servers.with_users(folder, mlflow_template, password)
    server.start()
    yield MlflowServer(server.uri, "admin", password)
    server.kill()


@pytest.fixture(scope="module")
def ask(guarded: MlflowServer) -> Callable[..., int]:
    """ask(role, method, what, values) -> the status of MLflow's answer to the user of that role."""
    for _ in range(2):
        ensure_roles(guarded)
        for role in ROLES:
            ensure_user(guarded, role, f"password of the {role}", role)
    admin = (guarded.user, guarded.password)

    def asked(role: str, method: str, what: str, values: dict[str, Any]) -> int:
        given = {"params": values} if method == "GET" else {"json": values}
        auth = admin if role == "admin" else (role, f"password of the {role}")
        address = f"{guarded.uri}/api/2.0/mlflow/{what}"
        return requests.request(method, address, auth=auth, timeout=30, **given).status_code

    assert asked("admin", "POST", "registered-models/create", {"name": "team"}) == 200
    version = {"name": "team", "source": "s3://mlflow/version"}
    assert asked("admin", "POST", "model-versions/create", version) == 200
    return asked


ALIAS = {"name": "team", "alias": "champion", "version": "1"}
TAG = {"name": "team", "version": "1", "key": "copal.log", "value": "1"}


@pytest.mark.parametrize(
    ("method", "what", "values", "allowed"),
    [
        ("GET", "registered-models/get", {"name": "team"}, {"reader", "worker", "promoter"}),
        ("POST", "registered-models/alias", ALIAS, {"worker", "promoter"}),
        ("POST", "model-versions/set-tag", TAG, {"worker", "promoter"}),
        ("POST", "model-versions/create", {"name": "team", "source": "s3://mlflow/other"}, {"worker", "promoter"}),
        ("DELETE", "registered-models/alias", {"name": "team", "alias": "nobody's"}, {"worker"}),
    ],
)
def test_each_role_may_what_it_is_for_and_no_more(ask, method, what, values, allowed) -> None:
    refused = {role for role in ROLES if ask(role, method, what, values) == 403}
    assert refused == set(ROLES) - allowed


def test_a_user_without_a_role_sees_nothing(guarded, ask) -> None:
    ensure_user(guarded, "guest", "password of the guest", "reader")
    assert ask("guest", "GET", "registered-models/get", {"name": "team"}) == 200
    roles = requests.get(
        f"{guarded.uri}/api/3.0/mlflow/users/roles/list",
        params={"username": "guest"},
        auth=(guarded.user, guarded.password),
        timeout=30,
    ).json()["roles"]
    gone = {"username": "guest", "role_id": roles[0]["id"]}
    answer = requests.delete(
        f"{guarded.uri}/api/3.0/mlflow/roles/unassign", json=gone, auth=(guarded.user, guarded.password), timeout=30
    )
    assert answer.ok
    assert ask("guest", "GET", "registered-models/get", {"name": "team"}) == 403


def test_who_gets_another_role_loses_the_one_before(guarded, ask) -> None:
    ensure_user(guarded, "mover", "password of the mover", "worker")
    assert ask("mover", "POST", "registered-models/alias", ALIAS) == 200
    ensure_user(guarded, "mover", "password of the mover", "reader")
    assert ask("mover", "POST", "registered-models/alias", ALIAS) == 403
    assert ask("mover", "GET", "registered-models/get", {"name": "team"}) == 200


def test_a_permission_that_somebody_changed_is_set_right(guarded, ask) -> None:
    ensure_roles(guarded, {"reader": "EDIT"})
    assert ask("reader", "POST", "registered-models/alias", ALIAS) == 200
    ensure_roles(guarded)
    assert ask("reader", "POST", "registered-models/alias", ALIAS) == 403


def test_what_the_server_refuses_is_one_line_without_the_password(guarded, ask) -> None:
    with pytest.raises(UsersError, match="has no role owner: there are reader, worker, promoter"):
        ensure_user(guarded, "nobody", "password of nobody", "owner")
    assert ask("nobody", "GET", "registered-models/get", {"name": "team"}) == 401, "no user was made"
    with pytest.raises(UsersError, match="does not know admin with this password") as caught:
        ensure_roles(MlflowServer(guarded.uri, "admin", "a wrong one"))
    assert "a wrong one" not in str(caught.value) + repr(MlflowServer("http://x", "admin", "a wrong one"))


def test_a_user_is_added_by_hand(guarded, ask, monkeypatch, capsys) -> None:
    monkeypatch.setenv("COPAL_REGISTRY_URI", guarded.uri)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", guarded.user)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", guarded.password)
    monkeypatch.setattr("sys.stdin", io.StringIO("password of the anna\n"))
    assert main("user", "anna", "promoter") == 0
    assert ask("anna", "POST", "registered-models/alias", ALIAS) == 200
    assert main("user", "berta", "promoter") == 2, "standard input is at its end"
    assert "must be the password of berta" in capsys.readouterr().err


def test_a_server_that_is_away_is_one_line() -> None:
    with pytest.raises(UsersError, match=r"the MLflow server at http://127\.0\.0\.1:\d+ does not answer"):
        ensure_roles(MlflowServer(f"http://127.0.0.1:{servers.free_port()}", "admin", "x"))


# --- Prefect's pools and deployments


@pytest.mark.team  # `prefect deploy` takes ten seconds and more to start
def test_pools_and_deployments_are_set_up_twice_without_a_second_of_any(prefect, monkeypatch, capsys) -> None:
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL

    for name, value in (VARIABLES | {"PREFECT_API_URL": str(PREFECT_API_URL.value())}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("COPAL_WATCH_INTERVAL", "600")
    monkeypatch.setenv("COPAL_WEBHOOK_URL", "https://chat.example/a-token")
    try:
        assert [main(), main()] == [0, 0], capsys.readouterr().err
        said = capsys.readouterr().out
        assert "work pools: copal-cpu, copal-gpu, of the type process" in said
        assert "deployments: watch, adapt, withdraw, promote, rollback, verify" in said
        assert "alerts: copal gates failed" in said
        assert "a-token" not in said
        with get_client(sync_client=True) as client:
            assert {pool.name for pool in client.read_work_pools()} >= set(POOLS)
            made = {each.name: each for each in client.read_deployments() if each.work_pool_name in POOLS}
        assert sorted(made) == ["adapt", "promote", "rollback", "verify", "watch", "withdraw"]
        assert {each.parameters["workspace"] for each in made.values()} == {VARIABLES["COPAL_WORKSPACE"]}
        assert made["watch"].schedules[0].schedule.interval.total_seconds() == 600
    finally:
        with get_client(sync_client=True) as client:
            for each in client.read_deployments():
                if each.work_pool_name in POOLS:
                    client.delete_deployment(each.id)
            for automation in client.read_automations():
                client.delete_automation(automation.id)
            for pool in POOLS:
                client.delete_work_pool(pool)


def test_a_pool_gets_the_template_of_today_and_never_another_type(prefect) -> None:
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL

    api = str(PREFECT_API_URL.value())
    base = json.loads((INFRA / "kubernetes" / "base" / "job-template.json").read_text())
    try:
        for memory in ("4Gi", "8Gi"):
            create_pools(api, None, "kubernetes", {pool: pool_template(base, {"memory": memory}) for pool in POOLS})
            with get_client(sync_client=True) as client:
                found = client.read_work_pool("copal-gpu")
            assert found.type == "kubernetes"
            assert found.base_job_template["variables"]["properties"]["memory"]["default"] == memory
        with pytest.raises(UpError, match="copal-cpu is of the type kubernetes, not process: delete it"):
            create_pools(api, None)
    finally:
        with get_client(sync_client=True) as client:
            for pool in POOLS:
                client.delete_work_pool(pool)


def test_a_password_in_the_url_of_the_workspace_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"COPAL_WORKSPACE \(https://git\.example/team\.git\) holds a") as caught:
        read_team(VARIABLES | {"COPAL_WORKSPACE": "https://me:tok-en@git.example/team.git"})
    assert "tok-en" not in str(caught.value)


# --- buckets


def test_buckets_are_made_once_with_their_policies(tmp_path, monkeypatch) -> None:
    server = S3Server()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    server.start()
    try:
        for _ in range(2):
            for bucket in parse_buckets("shared=worker:r,people:rw results"):
                ensure_bucket(bucket)
        client = boto3.client("s3")
        assert [each["Name"] for each in client.list_buckets()["Buckets"]].count("results") == 1
        assert json.loads(client.get_bucket_policy(Bucket="shared")["Policy"]) == policy(
            Bucket("shared", {"worker": "r", "people": "rw"})
        )
    finally:
        server.kill()


def test_who_may_read_a_bucket_may_not_write_it() -> None:
    (bucket,) = parse_buckets("data=worker:r,people:rw")
    reads, writes = policy(bucket)["Statement"]
    assert reads["Principal"] == {"AWS": ["worker"]}
    assert not {"s3:PutObject", "s3:DeleteObject"} & {*reads["Action"]}
    assert {"s3:PutObject", "s3:DeleteObject", "s3:GetObject"} <= {*writes["Action"]}


@pytest.mark.parametrize("text", ["Data", "data=", "data=worker", "data=worker:x", "data=:r", "a"])
def test_what_is_no_bucket_is_refused(text) -> None:
    with pytest.raises(SettingsError, match="is no bucket with its accounts"):
        parse_buckets(text)


# --- the variables


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"PREFECT_API_URL": ""}, "PREFECT_API_URL is not set"),
        (
            {"COPAL_WORKSPACE": "team"},
            "COPAL_WORKSPACE must be a git URL, or an absolute path on the workers, not 'team'",
        ),
        ({"COPAL_POOL_TYPE": "docker"}, "COPAL_POOL_TYPE must be process or kubernetes, not 'docker'"),
        ({"COPAL_POOL_TYPE": "kubernetes"}, "COPAL_JOB_TEMPLATE is not set"),
        ({"COPAL_WATCH_INTERVAL": "soon"}, "COPAL_WATCH_INTERVAL must be a number of seconds above 0, not 'soon'"),
        ({"COPAL_WATCH_INTERVAL": "nan"}, "COPAL_WATCH_INTERVAL must be a number of seconds above 0, not 'nan'"),
    ],
)
def test_a_variable_that_cannot_be_is_named(change, said) -> None:
    with pytest.raises(SettingsError, match=said):
        read_team(VARIABLES | change)


def test_a_wrong_variable_is_exit_code_2_and_one_line(monkeypatch, capsys) -> None:
    monkeypatch.setenv("COPAL_WORKSPACE", "here")
    assert main() == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main("what") == 2


def test_no_password_is_in_what_is_told_of_a_team() -> None:
    secret = {"MLFLOW_TRACKING_PASSWORD": "a-secret", "MLFLOW_READER_PASSWORD": "b-secret"}
    secret |= {"COPAL_REGISTRY_URI": "http://mlflow:5000", "MLFLOW_TRACKING_USERNAME": "admin"}
    found = read_team(
        VARIABLES | secret | {"PREFECT_API_AUTH_STRING": "copal:c-secret", "COPAL_WEBHOOK_URL": "d-secret"}
    )
    assert found.mlflow is not None
    assert found.passwords == {"reader": "b-secret"}
    assert "-secret" not in repr(found)
