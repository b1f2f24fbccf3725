"""The main job by hosts that share nothing but stores: each has its own home, and the one before is gone."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from flows.data.git import git
from flows.isolated import isolated_environment, isolated_python
from flows.workspace import open_workspace
from support.benches import PARAMS, Bench
from support.servers import MlflowServer

pytestmark = pytest.mark.team


@dataclass(frozen=True)
class Host:
    """A machine of the team's, with a folder of its own.

    Attributes:
        stores: the variables that name what the team shares.
    """

    folder: Path
    stores: dict[str, str]

    def copal(self, *arguments: str, status: int = 0) -> str:
        """What `copal ARGUMENTS` prints."""
        home = self.folder / "home"
        home.mkdir(parents=True, exist_ok=True)
        inherited = isolated_environment()
        for name in ("XDG_CACHE_HOME", "PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
            inherited.pop(name, None)
        environment = inherited | self.stores | {"HOME": str(home), "PREFECT_HOME": str(home / "prefect")}
        done = subprocess.run(
            isolated_python("flows.cli", *arguments), env=environment, cwd=self.folder, capture_output=True, text=True
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout

    def gone(self) -> None:
        shutil.rmtree(self.folder)


@pytest.fixture
def server(tmp_path, mlflow_template):
    """An MLflow server that keeps artifacts in a place of its own."""
    (tmp_path / "mlflow").mkdir()
    found = MlflowServer(tmp_path / "mlflow", mlflow_template, serves=True)
    found.start()
    yield found
    found.kill()


def fetched_models(server: MlflowServer) -> set[str]:
    """The models whose weights somebody has fetched, by MLflow's ids."""
    found = (re.search(r"GET \S*/models/(m-\w+)/\S*\.safetensors", asked) for asked in server.requests())
    return {match[1] for match in found if match}


@pytest.mark.slow
def test_the_main_job_by_hosts_that_share_nothing_but_stores(tmp_path, server, postgresql, tiny_base):
    origin, data = tmp_path / "origin.git", tmp_path / "dvc"
    url = f"file://{origin}"
    stores = {
        "COPAL_REGISTRY_URI": server.uri,
        "COPAL_LEDGER_URI": postgresql.uri(postgresql.new_database()),
        "COPAL_WORKSPACE": url,
    }
    one, two, three, four, five = (Host(tmp_path / f"host{number}", stores) for number in range(1, 6))

    # one registers the base and pushes the workspace
    made = one.folder / "team"
    one.folder.mkdir()
    shutil.copytree(tiny_base, one.folder / "base")
    one.copal("init", str(made), "--base", str(one.folder / "base"))
    (made / "params.yaml").write_text(PARAMS.replace("tiny", "team") + "gates: {dense: null, promote: auto}\n")
    (made / ".dvc" / "config").write_text(f"[core]\n    remote = store\n['remote \"store\"']\n    url = {data}\n")
    git(made, "add", "--all")
    git(made, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--message", "Settings")
    git(tmp_path, "clone", "--quiet", "--bare", str(made), str(origin))
    one.gone()

    # two commits a dataset
    two.folder.mkdir()
    git(two.folder, "clone", "--quiet", str(origin), "team")
    bench = Bench(open_workspace(two.folder / "team"), tiny_base)
    bench.commit("code", 0)
    subprocess.run(isolated_python("dvc", "push", "--quiet"), cwd=bench.root, env=os.environ.copy(), check=True)
    git(bench.root, "push", "--quiet", "origin", "HEAD")
    two.gone()

    # three looks, and takes the step
    told = three.copal("doctor")
    assert "a file could be stored in mlflow-artifacts:/" in told
    assert re.search(r"it is MLflow \S+, asks nobody who he is, answers in \d", told)
    assert re.search(r"ledger +0 log entries of team in postgresql\S+, which we may write", told)
    assert json.loads(three.copal("status", "--json"))["pending"]
    three.copal("watch", "--once")
    assert [version["version"] for version in json.loads(three.copal("status", "--json"))["versions"]] == [1, 2]
    assert len(fetched_models(server)) == 1, "of the base alone: what the step published was in its cache"
    three.gone()

    # four, fresh, runs the gates anew, verifies, and exports
    four.copal("gates", "2", "--again")
    four.copal("verify", "2")
    four.copal("export", "2", str(four.folder / "exported"))
    assert list((four.folder / "exported").glob("*.safetensors"))
    assert len(fetched_models(server)) == 2
    four.gone()

    # five makes it again from its record
    assert "identical" in five.copal("replay", "2")
    assert not list(tmp_path.glob("host[1-4]")), "nobody wrote into another host's folder"
