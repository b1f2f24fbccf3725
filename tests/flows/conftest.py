"""Workspaces with real git and DVC repositories, a real MLflow database and, where asked for, Prefect's harness."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flows.data.dvc import init_repository
from flows.workspace import open_workspace
from support.benches import PARAMS, Bench, sentence
from support.servers import MlflowServer, PostgresServer


@pytest.fixture
def by_hand() -> Iterator[None]:
    """No Prefect server is named, whatever other tests of this process have started."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        yield


@pytest.fixture(scope="session")
def prefect() -> Iterator[None]:
    """Prefect's test harness: one temporary server for the whole run."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


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


@pytest.fixture(scope="module")
def exchanged_files() -> Iterator[None]:
    """For tests that put other files in the place of a workspace's: no connection to its database outlives its use."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")
        yield


@pytest.fixture
def bench(make_bench: Callable[..., Bench], tmp_path: Path) -> Bench:
    """A workspace with the tiny base as version 1 and no data yet."""
    return make_bench(tmp_path / "workspace")


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory, mlflow_template: Path) -> Iterator[MlflowServer]:
    """One MLflow server for the whole run; who kills it starts it again."""
    server = MlflowServer(tmp_path_factory.mktemp("mlflow-server"), mlflow_template)
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgresServer]:
    """One PostgreSQL server for the whole run."""
    pytest.importorskip("psycopg2", reason="the driver of PostgreSQL is not installed: pip install 'copal[postgres]'")
    found = shutil.which("initdb") or next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))), None)
    if found is None:
        pytest.skip("PostgreSQL is not installed; on Debian and Ubuntu: apt-get install postgresql")
    folder = Path(tempfile.mkdtemp(prefix="copal-postgresql-"))  # pytest's own folders are closed to other users
    server = PostgresServer(Path(found).resolve().parent, folder)
    try:
        server.start()
        yield server
        server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
