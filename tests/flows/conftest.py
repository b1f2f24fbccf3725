"""Workspaces with real git and DVC repositories, a real MLflow database and, where asked for, Prefect's harness."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from copal.base import base_fingerprint
from flows.data.dvc import add_and_commit, init_repository
from flows.models.base import BaseModel
from flows.params import load_settings
from flows.project import Project, open_project, read_log
from flows.registry.registry import Registry
from flows.settings import Settings
from flows.step.register import register_root
from flows.workspace import Workspace, open_workspace

PARAMS = """
model: {name: tiny, dtype: float32}
calibration: {window_length: 32, windows: 8, evaluation_windows: 8, evaluation_share: 0.4}
prune: {iterations: 30}
"""


@pytest.fixture(scope="session")
def prefect() -> Iterator[None]:
    """Prefect's test harness: one temporary server for the whole run."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


class Bench:
    """A workspace and what a user does in it."""

    def __init__(self, workspace: Workspace, base: Path) -> None:
        self.workspace, self.base = workspace, base
        self.root = workspace.root

    @property
    def settings(self) -> Settings:
        return load_settings(self.workspace.params)

    @property
    def project(self) -> Project:
        """Opened anew each time: it sees what others did in between."""
        return open_project(self.root)

    @property
    def log(self) -> list[dict]:
        """The log as it is now, checked."""
        return read_log(self.project)

    @property
    def registry(self) -> Registry:
        return self.project.registry

    def write(self, domain: str, seed: int, documents: int = 24) -> None:
        """Put made-up text into data/`domain`; each seed speaks another dialect."""
        folder = self.root / "data" / domain
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"id": f"{domain}-{number}", "text": text(seed, number)}) for number in range(documents)]
        (folder / "documents.jsonl").write_text("\n".join(lines) + "\n")

    def commit(self, domain: str, seed: int, documents: int = 24) -> str:
        """A new version of `domain`: written, tracked by DVC and committed."""
        self.write(domain, seed, documents)
        return self.track(domain)

    def track(self, domain: str) -> str:
        """Track data/`domain` as it lies there, and commit."""
        return add_and_commit(self.root, domain, f"Add {domain}")

    def set(self, old: str, new: str) -> None:
        """Edit params.yaml."""
        params = self.workspace.params.read_text()
        assert old in params
        self.workspace.params.write_text(params.replace(old, new))

    def lose_data(self) -> None:
        """Delete DVC's cache; there is no remote."""
        shutil.rmtree(self.root / ".dvc" / "cache")

    def register_root(self) -> None:
        """Register the tiny base under the name in params.yaml."""
        base = BaseModel(folder=self.base, fingerprint=base_fingerprint(self.base), source="tiny")
        register_root(self.project, base)

    def snapshot(self) -> dict[str, str]:
        """What must not change when input is refused: every file but caches and the lock, by its hash."""
        ignored = (
            ".copal/cache",
            ".copal/lock",
            ".dvc/tmp",
            ".dvc/cache",
            ".git",
            ".copal/mlflow.db",
            ".copal/ledger.db",
        )
        files = (path for path in sorted(self.root.rglob("*")) if path.is_file())
        named = ((path, path.relative_to(self.root).as_posix()) for path in files)
        return {
            name: hashlib.sha256(path.read_bytes()).hexdigest() for path, name in named if not name.startswith(ignored)
        }


def text(seed: int, number: int) -> str:
    """200 characters of a dialect: each seed favours other letters."""
    digest = hashlib.sha256(f"{seed}/{number}".encode()).hexdigest()
    letters = hashlib.sha256(str(seed).encode()).hexdigest()[:8] + " "
    return "".join(letters[int(digit, 16) % len(letters)] for digit in digest * 3) + f" {number}"


@pytest.fixture(scope="session")
def mlflow_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database, migrated once (2 s); tests copy it."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}", registry_uri=f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A git + DVC repository with settings, copied for each test."""
    root = tmp_path_factory.mktemp("workspaces") / "template"
    init_repository(root)
    (root / "params.yaml").write_text(PARAMS)
    (root / "data").mkdir()
    return root


@pytest.fixture(scope="session")
def make_bench(template: Path, tiny_base: Path, mlflow_template: Path) -> Callable[..., Bench]:
    """make_bench(root, base=tiny_base) -> a workspace in the new folder `root` with the base as version 1, no data."""

    def make(root: Path, base: Path = tiny_base) -> Bench:
        shutil.copytree(template, root)
        (root / ".copal").mkdir(exist_ok=True)
        shutil.copyfile(mlflow_template, root / ".copal" / "mlflow.db")
        found = Bench(open_workspace(root), base)
        found.register_root()
        return found

    return make


def sentence(language: int, number: int) -> str:
    """Some 200 characters in one of the languages that `learnt_base` knows: eight words each."""
    words = [hashlib.sha256(f"{language}/{word}".encode()).hexdigest()[:4] for word in range(8)]
    drawn = hashlib.sha256(f"{language}/{number}".encode()).hexdigest()
    return " ".join(words[int(digit, 16) % len(words)] for digit in drawn[:40]) + f" {number}"


@pytest.fixture(scope="session")
def learnt_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base after a few seconds of learning three languages: forgetting means something on it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("learnt") / "base"
    shutil.copytree(tiny_base, folder)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    rows = []
    for language in range(3):
        read = [token for number in range(1000, 1040) for token in tokenizer(sentence(language, number))["input_ids"]]
        rows.append(torch.tensor(read[: len(read) // 32 * 32]).view(-1, 32))
    windows = torch.cat(rows)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(200):
        batch = windows[torch.randint(len(windows), (16,), generator=generator)]
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_learnt_bench(make_bench: Callable[..., Bench], learnt_base: Path) -> Callable[[Path], Bench]:
    """make_learnt_bench(root) -> a workspace with `learnt_base` as version 1 and three domains in its languages."""

    def make(root: Path) -> Bench:
        found = make_bench(root, learnt_base)
        for language, domain in enumerate(("code", "legal", "medical")):
            folder = found.root / "data" / domain
            folder.mkdir()
            rows = [json.dumps({"id": f"{domain}-{n}", "text": sentence(language, n)}) for n in range(24)]
            (folder / "documents.jsonl").write_text("\n".join(rows) + "\n")
            found.track(domain)
        return found

    return make


@pytest.fixture
def bench(make_bench: Callable[..., Bench], tmp_path: Path) -> Bench:
    """A workspace with the tiny base as version 1 and no data yet."""
    return make_bench(tmp_path / "workspace")


class MlflowServer:
    """A real MLflow server on a database of its own, that can be killed and started again."""

    def __init__(self, folder: Path, database: Path) -> None:
        shutil.copyfile(database, folder / "mlflow.db")
        self.folder = folder
        with contextlib.closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)),
            *(
                "--backend-store-uri",
                f"sqlite:///{self.folder / 'mlflow.db'}",
                "--workers",
                "1",
                "--no-serve-artifacts",
            ),
        ]
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, env=environment, cwd=self.folder, stdout=log, stderr=log, start_new_session=True
            )
        pause = threading.Event()
        for _ in range(1200):
            assert self._process.poll() is None, (self.folder / "log").read_text()
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                return
            pause.wait(0.1)
        raise AssertionError((self.folder / "log").read_text())

    def kill(self) -> None:
        """kill -9, with its workers."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory, mlflow_template: Path) -> Iterator[MlflowServer]:
    """One MLflow server for the whole run; who kills it starts it again."""
    server = MlflowServer(tmp_path_factory.mktemp("mlflow-server"), mlflow_template)
    server.start()
    yield server
    server.kill()
