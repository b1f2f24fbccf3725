from __future__ import annotations

import http.server
import os
import re
import shutil
import socket
import threading
from types import SimpleNamespace

import pytest

from flows.cli import checks, stores
from flows.cli import doctor as module
from flows.cli.checks import Check
from flows.cli.doctor import doctor, render
from support.tasks import write_task

NAMES = [
    "python", "torch", "transformers", "git", "dvc", "domains", "other data", "tasks", "mlflow", "artifacts", "ledger",
    "prefect", "fastapi", "disk", "memory", "workspace",
]  # fmt: skip


def look(path) -> dict[str, Check]:
    found = doctor(path)
    assert [check.name for check in found] == NAMES
    assert all(check.advice for check in found if check.ok is not True)
    return {check.name: check for check in found}


def test_a_good_workspace(bench):
    bench.commit("code", 0)
    before = bench.snapshot()
    checks = look(bench.root)
    assert not [check for check in checks.values() if check.ok is False]
    assert "domains at HEAD: code" in checks["dvc"].found
    assert checks["dvc"].ok is None  # no remote
    assert "newest is version 1 of tiny" in checks["mlflow"].found
    assert "0 log entries of tiny in sqlite:///" in checks["ledger"].found
    assert "products in float32" in checks["torch"].found  # as params.yaml says
    assert checks["workspace"].ok
    assert bench.snapshot() == before


def test_outside_a_workspace_it_looks_at_what_is_there(tmp_path):
    checks = look(tmp_path / "nowhere")
    assert not [check for check in checks.values() if check.ok is False]
    assert checks["workspace"].ok is None
    assert "copal init" in checks["workspace"].advice
    assert not any(tmp_path.iterdir())


def test_a_remote_and_an_identity(bench, monkeypatch, tmp_path):
    (bench.root / ".dvc" / "config").write_text("[core]\n    remote = s\n['remote \"s\"']\n    url = /tmp/remote\n")
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    checks = look(bench.root)
    assert checks["dvc"].ok is True
    assert checks["git"].ok is None
    (tmp_path / "gitconfig").write_text("[user]\n    name = Ada\n    email = ada@localhost\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    assert "commits as Ada <ada@localhost>" in look(bench.root)["git"].found


def test_one_broken_thing_does_not_hide_the_others(bench, monkeypatch):
    (bench.root / ".copal" / "mlflow.db").write_bytes(b"not a database")
    (bench.root / ".copal" / "ledger.db").write_bytes(b"not a database either")
    (bench.root / "data" / "x.dvc").write_text("outs: [")
    real = checks.package

    def broken(name):
        if name == "transformers":
            raise OSError("libcudart.so.12: cannot open shared object file")
        return real(name)

    for place in (module, stores):
        monkeypatch.setattr(place, "package", broken)
    found = look(bench.root)
    assert found["mlflow"].ok is False
    assert "mlflow.db" in found["mlflow"].found
    assert found["ledger"].ok is False
    assert "ledger.db: file is not a database" in found["ledger"].found
    assert found["transformers"] == Check(
        name="transformers",
        ok=False,
        found="is broken: libcudart.so.12: cannot open shared object file",
        advice="install copal again, in a new venv",
    )
    assert found["workspace"].ok


def test_tasks_of_domains_need_what_asks_them(bench, monkeypatch):
    assert look(bench.root)["tasks"].found == "none in data/"
    write_task(bench.root / "data" / "code")
    assert look(bench.root)["tasks"].found.startswith("1 in data/, asked by lm-evaluation-harness")
    monkeypatch.setattr(module, "harness_version", lambda: None)
    check = look(bench.root)["tasks"]
    assert (check.ok, check.advice) == (False, "pip install 'copal[tasks]'")
    write_task(bench.root / "data" / "code", "task: [")
    assert look(bench.root)["tasks"].found.startswith("data/code/tasks/dialect.yaml is not YAML")


def test_bad_settings(bench):
    bench.set("prune: {", "prune: {sparsity: 7, ")
    check = look(bench.root)["workspace"]
    assert check.ok is False
    assert "prune.sparsity" in check.found


def test_a_version_out_of_range_or_not_there(monkeypatch):
    def version(name):
        if name == "dvc":
            raise checks.metadata.PackageNotFoundError(name)
        return {"fastapi": "0.151.0", "mlflow": "3.17.2"}[name]

    requires = ["fastapi<0.151", "mlflow<4,>=3.17", "fastapi>=1; extra == 'dev'"]
    there = SimpleNamespace(
        version=version, requires=lambda _: requires, PackageNotFoundError=checks.metadata.PackageNotFoundError
    )
    monkeypatch.setattr(checks, "metadata", there)
    assert checks.package("fastapi") == Check(
        name="fastapi", ok=False, found="0.151.0, copal needs <0.151", advice="pip install 'fastapi<0.151'"
    )
    assert checks.package("mlflow").ok
    assert checks.package("dvc").ok is False


def test_no_git(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert module._git(tmp_path) == Check(name="git", ok=False, found="is not on PATH", advice="install git")


def test_room_on_the_disk_and_in_memory(bench, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=100_000))
    monkeypatch.setattr("flows.step.resources.free_memory", lambda: 200_000)
    found = look(bench.root)
    assert (found["disk"].ok, found["memory"].ok) == (False, False)
    assert re.search(r"^0\.1 MB of disk in \S+\.copal free; a step needs about 0\.\d MB$", found["disk"].found)
    assert re.search(r"^0\.2 MB of memory free; a step needs about 1\.\d MB$", found["memory"].found)
    assert "gc" in found["disk"].advice
    assert "model.batch" in found["memory"].advice


@pytest.fixture
def prefect_at():
    """prefect_at(url): that is the API URL in Prefect's settings for the rest of the test."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    entered = []

    def enter(url: str) -> None:
        entered.append(temporary_settings({PREFECT_API_URL: url}))
        entered[-1].__enter__()

    yield enter
    for settings in reversed(entered):
        settings.__exit__(None, None, None)


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_a_prefect_server(prefect_at, known):
    class Server(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            said = {"/api/admin/version": b'"3.8.8"', "/api/work_pools/filter": b"[]"}.get(self.path)
            self.send_response((200 if said else 404) if known else 401)
            self.send_header("Content-Length", str(len(said or b"")))
            self.end_headers()
            self.wfile.write(said or b"")

        do_GET = do_POST = answer  # noqa: N815

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/api"
        prefect_at(url)
        check = stores.prefect()
        server.shutdown()
    assert check.ok is known
    if known:
        assert check.found.endswith(f"the server {url} answers, version 3.8.8, work pools: none")
    else:
        assert check.found.endswith(f"the server {url} does not know us (HTTP 401)")
        assert "PREFECT_API_AUTH_STRING" in check.advice


def test_a_prefect_server_that_does_not_answer(prefect_at):
    with socket.socket() as taken:  # bound but not listening: nobody answers, and nobody else gets the port
        taken.bind(("127.0.0.1", 0))
        prefect_at(f"http://me:secret@127.0.0.1:{taken.getsockname()[1]}/api")
        check = stores.prefect()
    assert check.ok is False
    assert "does not answer" in check.found
    assert "secret" not in check.found


def test_render():
    assert (
        render(
            [Check(name="git", ok=True, found="2.39"), Check(name="disk", ok=None, found="full", advice="make room")]
        )
        == "ok    git          2.39\nnote  disk         full\n                   -> make room"
    )
