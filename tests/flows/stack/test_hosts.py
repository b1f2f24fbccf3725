"""The main job by hosts that share nothing but stores: each has its own home and role, and the one before is gone."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient

from flows.data.git import git
from flows.isolated import isolated_environment, isolated_python
from flows.ledger import LINEAGE, Ledger
from flows.stack.mlflow_users import ROLES, ensure_roles, ensure_user
from flows.stack.mlflow_users import MlflowServer as Administered
from flows.workspace import open_workspace
from support.benches import PARAMS, Bench
from support.ledgers import run_sql
from support.servers import MlflowServer, PostgresServer, with_users

pytestmark = pytest.mark.team

PASSWORD = "the password of the {}"


@dataclass(frozen=True)
class Stores:
    """What the team shares, and how each role is let in."""

    mlflow: MlflowServer
    postgresql: PostgresServer
    database: str
    origin: Path
    data: Path

    def variables(self, role: str) -> dict[str, str]:
        return {
            "COPAL_REGISTRY_URI": self.mlflow.uri,
            "MLFLOW_TRACKING_USERNAME": role,
            "MLFLOW_TRACKING_PASSWORD": PASSWORD.format(role),
            "COPAL_LEDGER_URI": self.postgresql.uri(self.database, f"{role}_{self.database}"),
            "COPAL_WORKSPACE": f"file://{self.origin}",
        }

    def snapshot(self) -> object:
        """Everything that a reader could have changed, as an administrator sees it."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
            patch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD.format("admin"))
            client = MlflowClient(tracking_uri=self.mlflow.uri, registry_uri=self.mlflow.uri)
            experiments = [found.experiment_id for found in client.search_experiments()]
            models = [
                (found.name, dict(found.aliases), dict(found.tags)) for found in client.search_registered_models()
            ]
            versions = [(found.version, dict(found.tags)) for found in client.search_model_versions("name = 'team'")]
            runs = sorted(found.info.run_id for found in client.search_runs(experiments))
            logged = sorted(found.model_id for found in client.search_logged_models(experiments))
        ledger = Ledger(self.postgresql.uri(self.database), "team")
        files = sorted(str(path) for path in (self.mlflow.folder / "artifacts").rglob("*"))
        holder = ledger.holder(LINEAGE)
        assert holder is not None
        return experiments, models, versions, runs, logged, files, ledger.log(), (holder.token, holder.what)


@dataclass(frozen=True)
class Host:
    """A machine of the team's, with a folder of its own and nothing else."""

    folder: Path
    variables: dict[str, str]

    def copal(self, *arguments: str, status: int = 0) -> str:
        """What `copal ARGUMENTS` prints; where it is refused, its one line."""
        home = self.folder / "home"
        home.mkdir(parents=True, exist_ok=True)
        inherited = isolated_environment()
        for name in ("XDG_CACHE_HOME", "COPAL_HOME", "PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
            inherited.pop(name, None)
        environment = inherited | self.variables | {"HOME": str(home), "PREFECT_HOME": str(home / "prefect")}
        done = subprocess.run(
            isolated_python("flows.cli", *arguments),
            env=environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == status, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout if status == 0 else done.stderr

    def gone(self) -> None:
        shutil.rmtree(self.folder)


@pytest.fixture
def stores(tmp_path: Path, mlflow_template: Path, postgresql: PostgresServer) -> Iterator[Stores]:
    """An MLflow server with users and artifacts of its own, and a database in which each role has its rights."""
    if importlib.util.find_spec("flask_wtf") is None:
        pytest.skip("MLflow's basic-auth needs Flask-WTF: pip install 'mlflow[auth]'")
    (tmp_path / "mlflow").mkdir()
    server = with_users(tmp_path / "mlflow", mlflow_template, PASSWORD.format("admin"), serves=True)
    server.start()
    try:
        administered = Administered(server.uri, "admin", PASSWORD.format("admin"))
        ensure_roles(administered)
        database = postgresql.new_database()
        for role in ROLES:
            ensure_user(administered, role, PASSWORD.format(role), role)
            run_sql(postgresql.uri("postgres"), f"CREATE ROLE {role}_{database} LOGIN")
        run_sql(postgresql.uri(database), f"GRANT CREATE ON SCHEMA public TO worker_{database}")
        worker = f"ALTER DEFAULT PRIVILEGES FOR ROLE worker_{database} IN SCHEMA public GRANT"
        run_sql(postgresql.uri(database), f"{worker} SELECT ON TABLES TO reader_{database}")
        run_sql(postgresql.uri(database), f"{worker} SELECT, INSERT, UPDATE ON TABLES TO promoter_{database}")
        yield Stores(server, postgresql, database, tmp_path / "origin.git", tmp_path / "dvc")
    finally:
        server.kill()


def fetched_models(server: MlflowServer) -> set[str]:
    """The models whose weights somebody has fetched, by MLflow's ids."""
    found = (re.search(r"GET \S*/models/(m-\w+)/\S*\.safetensors", asked) for asked in server.requests())
    return {match[1] for match in found if match}


@pytest.mark.slow
def test_the_main_job_by_hosts_that_share_nothing_but_stores(tmp_path, stores, tiny_base):
    def host(name: str, role: str) -> Host:
        (tmp_path / name).mkdir()
        return Host(tmp_path / name, stores.variables(role))

    # One registers the base and pushes the workspace.
    one = host("one", "worker")
    made = one.folder / "team"
    shutil.copytree(tiny_base, one.folder / "base")
    one.copal("init", str(made), "--base", str(one.folder / "base"))
    (made / "params.yaml").write_text(PARAMS.replace("tiny", "team") + "gates: {dense: null, promote: manual}\n")
    remote = f"[core]\n    remote = store\n['remote \"store\"']\n    url = {stores.data}\n"
    (made / ".dvc" / "config").write_text(remote)
    git(made, "add", "--all")
    git(made, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--message", "Settings")
    git(tmp_path, "clone", "--quiet", "--bare", str(made), str(stores.origin))
    one.gone()

    # Two commits datasets.
    two = host("two", "reader")
    git(two.folder, "clone", "--quiet", str(stores.origin), "team")
    bench = Bench(open_workspace(two.folder / "team"), tiny_base)
    bench.commit("code", 0)
    bench.commit("legal", 1)
    subprocess.run(isolated_python("dvc", "push", "--quiet"), cwd=bench.root, env=os.environ.copy(), check=True)
    git(bench.root, "push", "--quiet", "origin", "HEAD")
    two.gone()

    # Three looks, and takes a step.
    three = host("three", "worker")
    told = three.copal("doctor")
    assert "a file could be stored in mlflow-artifacts:/" in told
    assert re.search(r"it is MLflow \S+, takes us for worker, answers in \d", told)
    assert re.search(r"ledger +0 log entries of team in postgresql\S+, which we may write", told)
    assert [data["domain"] for data in json.loads(three.copal("status", "--json"))["pending"]] == ["code", "legal"]
    before = len(stores.mlflow.requests())
    three.copal("adapt", "code")
    asked = stores.mlflow.requests()[before:]
    files = [line for line in asked if "/mlflow-artifacts/" in line]  # those of the base come, those of the version go
    assert len(asked) - len(files) <= 80, asked
    assert [version["version"] for version in json.loads(three.copal("status", "--json"))["versions"]] == [1, 2]
    assert len(fetched_models(stores.mlflow)) == 1, "of the base alone: what the step published was in its cache"
    three.gone()

    # Four may look at everything and change nothing.
    four = host("four", "reader")
    before = stores.snapshot()
    looks = (
        ("status",), ("plan",), ("lineage",), ("audit", "used", "code"), ("audit", "data", "--alias", "2"),
        ("gates", "2"), ("verify", "2"), ("export", "2", str(four.folder / "exported")),
    )  # fmt: skip
    for command in looks:
        four.copal(*command)
    assert list((four.folder / "exported").glob("*.safetensors"))
    refused = (
        ("adapt", "legal"), ("promote", "2"), ("rollback",), ("gates", "2", "--again"), ("gc",),
        ("withdraw", "code", "--why", "to try"),
    )  # fmt: skip
    for command in refused:
        said = four.copal(*command, status=2)
        assert said.startswith("copal: "), command
        assert said.count("\n") == 1, command
    assert stores.snapshot() == before
    four.gone()

    # Five promotes, and is named in the log.
    five = host("five", "promoter")
    five.copal("promote", "2", "--why", "it is good", "--force")
    log = json.loads(five.copal("lineage", "--json"))["log"]
    assert [entry["kind"] for entry in log] == ["gates", "promotion"]
    assert [entry["who"]["role"].partition("_")[0] for entry in log] == ["worker", "promoter"]
    said = five.copal("withdraw", "code", "--why", "to try", status=2)
    assert said.startswith("copal: ")
    five.gone()

    # Six makes it again from its record.
    six = host("six", "reader")
    assert "identical" in six.copal("replay", "2")
    assert not [name for name in ("one", "two", "three", "four", "five") if (tmp_path / name).exists()]
