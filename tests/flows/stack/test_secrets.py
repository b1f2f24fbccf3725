"""Secrets: each place that may hold one gets a canary, and after steps and failures none of them is anywhere else."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from dvc.repo import Repo

import flows
from flows.data.dvc import add_and_commit, init_repository
from flows.data.git import git
from flows.stack.up import down
from support.benches import text
from support.git_server import GitServer, command_lines, git_server
from support.servers import MlflowServer, PostgresServer, free_port
from support.waiting import until

VARIABLES = (
    *("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY"),
    *("PREFECT_API_KEY", "PREFECT_API_AUTH_STRING", "PREFECT_SERVER_DATABASE_PASSWORD", "HF_TOKEN", "PGPASSWORD"),
)


@dataclass
class Team:
    """A workspace whose every store wants a password, under `copal up`."""

    bench: Any
    data: Path
    mlflow: MlflowServer
    git: GitServer
    canaries: dict[str, str]
    environment: dict[str, str]
    said: dict[str, str] = field(default_factory=dict)

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command of copal's, and keep what it says."""
        command = [sys.executable, "-P", "-m", "flows.cli", *words, "--workspace", str(self.bench.root)]
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=400, check=False, cwd=self.data
        )
        self.said[" ".join(words)] = done.stdout + done.stderr
        return done

    def put(self, domain: str, lines: list[str]) -> None:
        """Commit a version of a domain to the repository of the data."""
        (self.data / "data" / domain).mkdir(parents=True, exist_ok=True)
        (self.data / "data" / domain / "documents.jsonl").write_text("\n".join(lines) + "\n")
        add_and_commit(self.data, domain, f"Add {domain}")
        with Repo(str(self.data)) as dvc:
            dvc.push()
        git(self.data, "update-server-info")

    def worker_says(self, words: str) -> bool:
        """Whether the log of a worker has these words; meanwhile the command lines are looked at."""
        self.git.lines |= command_lines()
        return any(words in log.read_text() for log in (self.bench.root / ".copal" / "logs").glob("worker-*.log"))


@pytest.fixture
def stack(
    make_bench: Any,
    tmp_path: Path,
    mlflow_template: Path,
    postgresql: PostgresServer,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Team]:
    canaries = {place: f"canary{secrets.token_hex(8)}" for place in ("registry", "ledger", "repository", *VARIABLES)}
    bench = make_bench(tmp_path / "workspace")
    data = tmp_path / "data repository"
    init_repository(data)
    remote = f"[core]\n    remote = store\n['remote \"store\"']\n    url = {tmp_path / 'store'}\n"
    (data / ".dvc" / "config").write_text(remote)
    git(data, "add", ".dvc/config")  # committed with the first domain
    mlflow = MlflowServer(tmp_path, mlflow_template)
    mlflow.start()
    with git_server(data, "me", canaries["repository"]) as server:
        stores = {
            "registry": {
                "uri": mlflow.uri.replace("http://", f"http://me:{canaries['registry']}@"),
                "artifacts": str(tmp_path / "stored"),
            },
            "ledger": {"uri": postgresql.uri(postgresql.new_database()).replace("a-secret", canaries["ledger"])},
            "watch": {"repository": server.url, "interval": 5},
        }
        bench.set("registry: {pictures: false}\n", "".join(f"{name}: {json.dumps(stores[name])}\n" for name in stores))
        bench.register_root()
        path = os.pathsep.join((str(Path(flows.__file__).parents[1]), os.environ.get("PYTHONPATH", "")))
        plain = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
        plain |= {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}  # else it asks a server that is away for minutes
        variables = {name: canaries[name] for name in VARIABLES}
        found = Team(bench, data, mlflow, server, canaries, os.environ | plain | variables | {"PYTHONPATH": path})
        done = found.run("up", "--detach", "--port", str(free_port()))
        try:
            assert done.returncode == 0, done.stderr
            yield found
        finally:
            down(bench.workspace)
            mlflow.kill()
            server.shutdown()


def test_no_secret_leaves_its_place(stack: Team, tmp_path: Path) -> None:
    stack.put("code", [json.dumps({"id": f"{n}", "text": text(1, n)}) for n in range(24)])
    until(lambda: stack.worker_says("version 2 of tiny"), 150, "a version")
    stack.put("broken", ["{"])
    until(lambda: stack.worker_says("broken"), 100, "a refusal")
    page, events = tmp_path / "lineage.html", tmp_path / "events.jsonl"
    commands = (
        *(("status",), ("status", "--json"), ("doctor",), ("plan",), ("lineage",), ("lineage", "--html", str(page))),
        *(("lineage", "--openlineage", str(events)), ("audit", "data", "--alias", "latest"), ("gates", "2")),
        *(("verify", "latest"), ("notify", "code"), ("adapt", "broken"), ("export", "2", str(tmp_path / "exported"))),
    )
    for words in commands:
        stack.run(*words)
    assert page.exists()
    assert events.exists()
    stack.mlflow.kill()
    until(lambda: stack.worker_says("RegistryError"), 150, "a failure of the registry")
    for words in (("status",), ("doctor",), ("verify", "latest", "--debug"), ("watch", "--once", "--verbose")):
        stack.run(*words)
    assert "the MLflow server at http://127.0.0.1" in stack.said["status"]
    found = {
        place: [
            *(str(path) for path in written(stack, tmp_path) if canary.encode() in path.read_bytes()),
            *(f"copal {words}" for words, said in stack.said.items() if canary in said),
            *(line.decode(errors="replace") for line in stack.git.lines if canary.encode() in line),
        ]
        for place, canary in stack.canaries.items()
    }
    assert {place: places for place, places in found.items() if places} == {}
    assert any(b"remote-http" in line for line in stack.git.lines), "git was looked at"
    assert any(b"flows.stack.serve" in line for line in stack.git.lines), "so were the servers"


def written(stack: Team, folder: Path) -> list[Path]:
    """All that was written: workspace, Prefect's database, MLflow's, records, page, events. Not the settings."""
    return [path for path in folder.rglob("*") if path.is_file() and path != stack.bench.workspace.params]
