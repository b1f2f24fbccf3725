"""The main job by hosts that share nothing but stores: each has its own home and role, and the one before is gone."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import replace

import pytest

from flows.data.git import git
from flows.isolated import isolated_python
from flows.workspace import open_workspace
from support.benches import PARAMS, Bench
from support.servers import MlflowServer
from support.teams import Host, publish, shared_workspace

pytestmark = pytest.mark.team


def fetched_models(server: MlflowServer) -> set[str]:
    """The models whose weights somebody has fetched, by MLflow's ids."""
    found = (re.search(r"GET \S*/models/(m-\w+)/\S*\.safetensors", asked) for asked in server.requests())
    return {match[1] for match in found if match}


@pytest.mark.slow
@pytest.mark.timeout(1800)  # thirty commands, each a process
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
    (made / ".dvc" / "config").write_text(stores.remote)
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
    environment = os.environ | stores.s3.environment
    subprocess.run(isolated_python("dvc", "push", "--quiet"), cwd=bench.root, env=environment, check=True)
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


def test_of_three_hosts_that_begin_a_step_at_once_one_takes_it(tmp_path, stores, template, tiny_base, monkeypatch):
    own = replace(stores, name="raced")
    for name, value in own.variables("worker").items():
        monkeypatch.setenv(name, value)
    bench = shared_workspace(own, tmp_path / "made", "raced", template, tiny_base)
    bench.commit("code", 0)
    publish(bench)
    hosts = [Host(tmp_path / f"host{number}", own.variables("worker")) for number in range(3)]
    for host in hosts:
        host.folder.mkdir()
    processes = [host.start("flows.cli", "adapt", "code") for host in hosts]
    said = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    last = sorted(out.splitlines()[0 if "adapted" in out else -1] for out, _ in said)
    known = "nothing to do: version 2 of raced knows code at this data version"
    assert last == [known, known, "version 2 of raced: adapted to code"]
    assert [version.tags.get("copal.domain") for version in bench.registry.versions()] == [None, "code"]
    assert [entry.kind for entry in bench.log] == ["gates"]
