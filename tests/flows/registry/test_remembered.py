"""What is remembered of a lineage is never older than its store, whoever wrote to that."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from flows.isolated import isolated_environment
from support.benches import Bench


def seen(bench: Bench) -> Path:
    return bench.registry._cache.folder / "tiny.seen.json"


def aliases(bench: Bench) -> tuple[str, ...]:
    return bench.registry.version(1).aliases


def by_hand(bench: Bench) -> MlflowClient:
    uri = bench.registry.tracking_uri
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def test_a_look_at_what_has_not_changed_needs_no_mlflow(bench):
    assert aliases(bench) == ("latest",)
    status = (
        "import sys; from flows.cli import main; code = main(['status', '--workspace', sys.argv[1]]); "
        "sys.exit(code or ('mlflow' in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", status, str(bench.root)], check=True, env=isolated_environment())


def test_what_others_write_is_seen_at_once(bench):
    assert aliases(bench) == ("latest",)
    by_hand(bench).set_registered_model_alias("tiny", "theirs", "1")
    assert aliases(bench) == ("theirs", "latest")
    by_hand(bench).delete_registered_model_alias("tiny", "theirs")
    assert aliases(bench) == ("latest",)


def test_an_older_copy_of_the_store_is_seen_too(bench, tmp_path):
    database = bench.root / ".copal" / "mlflow.db"
    shutil.copy2(database, tmp_path / "before.db")
    by_hand(bench).set_registered_model_alias("tiny", "theirs", "1")
    assert aliases(bench) == ("theirs", "latest")
    shutil.copyfile(tmp_path / "before.db", database)
    assert aliases(bench) == ("latest",)


def test_a_moved_workspace_is_read_anew(bench, tmp_path):
    assert Path(bench.registry.version(1).location.removeprefix("file://")).is_relative_to(bench.root)
    moved = shutil.move(bench.root, tmp_path / "moved")
    from flows.workspace import open_workspace

    there = Bench(open_workspace(Path(moved)), bench.base)
    assert Path(there.registry.version(1).location.removeprefix("file://")).is_relative_to(moved)


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"[]", b"null", b'{"key": 1}', b"\xff"],
    ids=["empty", "cut", "list", "null", "other", "binary"],
)
def test_a_damaged_memory_is_no_memory(bench, damage):
    assert aliases(bench) == ("latest",)
    seen(bench).write_bytes(damage)
    assert aliases(bench) == ("latest",)
    assert json.loads(seen(bench).read_text())["snapshot"]["there"]


def test_a_transaction_under_way_is_waited_for(bench):
    assert aliases(bench) == ("latest",)
    told = json.loads(seen(bench).read_text())
    told["snapshot"]["aliases"] = {"made-up": 1}
    seen(bench).write_text(json.dumps(told))
    assert aliases(bench) == ("made-up", "latest")  # it is what is believed while nobody writes
    journal = bench.root / ".copal" / "mlflow.db-journal"
    journal.touch()
    assert aliases(bench) == ("latest",)
