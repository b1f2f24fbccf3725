"""A team: stores that hosts share, and hosts that share nothing else."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient

from flows.data.git import git
from flows.isolated import isolated_environment, isolated_python
from flows.ledger import LINEAGE, Ledger
from flows.workspace import open_workspace
from support.benches import PARAMS, Bench
from support.buckets import S3Server
from support.servers import MlflowServer, PostgresServer, PrefectServer

PASSWORD = "the password of the {}"
BUCKETS = ("artifacts", "data")


@dataclass(frozen=True)
class Stores:
    """What the team shares, and how each role is let in."""

    mlflow: MlflowServer
    postgresql: PostgresServer
    prefect: PrefectServer
    s3: S3Server
    database: str
    folder: Path
    name: str = "team"

    @property
    def origin(self) -> Path:
        """The repository of the workspace."""
        return self.folder / f"{self.name}.git"

    @property
    def remote(self) -> str:
        """DVC's configuration, whose remote is on S3."""
        return f"[core]\n    remote = store\n['remote \"store\"']\n    url = s3://data/{self.name}\n"

    def variables(self, role: str) -> dict[str, str]:
        found = {
            "COPAL_REGISTRY_URI": self.mlflow.uri,
            "MLFLOW_TRACKING_USERNAME": role,
            "MLFLOW_TRACKING_PASSWORD": PASSWORD.format(role),
            "COPAL_LEDGER_URI": self.postgresql.uri(self.database, f"{role}_{self.database}"),
            "COPAL_WORKSPACE": f"file://{self.origin}",
            **self.s3.environment,  # of the data; artifacts go through MLflow
        }
        if role != "reader":  # who knows the auth string may run code on the workers
            found |= {"PREFECT_API_URL": self.prefect.api, "PREFECT_API_AUTH_STRING": self.prefect.auth}
        return found

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
        files = [self.s3.objects(bucket) for bucket in BUCKETS]
        holder = ledger.holder(LINEAGE)
        assert holder is not None
        return experiments, models, versions, runs, logged, files, ledger.log(), (holder.token, holder.what)


@dataclass(frozen=True)
class Host:
    """A machine of the team's, with a folder of its own and nothing else."""

    folder: Path
    variables: dict[str, str]

    def start(self, module: str, *arguments: str) -> subprocess.Popen[str]:
        """`python -m MODULE ARGUMENTS`; what it says can be read."""
        home = self.folder / "home"
        home.mkdir(parents=True, exist_ok=True)
        inherited = isolated_environment()
        for name in ("XDG_CACHE_HOME", "COPAL_HOME", "PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
            inherited.pop(name, None)
        return subprocess.Popen(
            isolated_python(module, *arguments),
            env=inherited | self.variables | {"HOME": str(home), "PREFECT_HOME": str(home / "prefect")},
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def copal(self, *arguments: str, status: int = 0) -> str:
        """What `copal ARGUMENTS` prints; where it is to be refused, its one line: quiet, for on a busy machine others
        tell that it is still looking.
        """
        process = self.start("flows.cli", *arguments, *(("--quiet",) if status else ()))
        out, err = process.communicate()
        assert process.returncode == status, f"{arguments}: {out}{err}"
        return out if status == 0 else err

    def gone(self) -> None:
        shutil.rmtree(self.folder)


def shared_workspace(stores: Stores, folder: Path, name: str, template: Path, base: Path) -> Bench:
    """A clone, in the new `folder`, of a workspace whose lineage `name` begins; what is given out goes to the stores.

    The environment must let a worker in.
    """
    shutil.copytree(template, folder)
    (folder / "params.yaml").write_text(PARAMS.replace("tiny", name) + "gates: {dense: null, promote: manual}\n")
    (folder / ".dvc" / "config").write_text(stores.remote)
    git(folder, "add", "--all")
    git(folder, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--message", "Settings")
    git(folder.parent, "clone", "--quiet", "--bare", str(folder), str(stores.origin))
    git(folder, "remote", "add", "origin", str(stores.origin))
    bench = Bench(open_workspace(folder), base)
    bench.register_root()
    return bench


def publish(bench: Bench) -> None:
    """Push data and commits to where all hosts find them."""
    subprocess.run(isolated_python("dvc", "push", "--quiet"), cwd=bench.root, env=isolated_environment(), check=True)
    git(bench.root, "push", "--quiet", "origin", "HEAD")
