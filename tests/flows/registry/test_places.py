"""A workspace that was moved or copied works by itself, and nothing outside of a workspace is written or deleted."""

from __future__ import annotations

import hashlib
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from flows.cli import main
from flows.registry.errors import RegistryError
from flows.stack.state import read_stack
from flows.stack.up import down
from flows.step.gc import collect
from flows.verification.verify import verify
from flows.workspace import WorkspaceError, open_workspace
from support.benches import Bench
from support.toys import step

LOADING = """
import sys
from mlflow import MlflowClient, set_tracking_uri
from mlflow.artifacts import download_artifacts
set_tracking_uri(sys.argv[1])
print(download_artifacts("models:/tiny@latest"))
"""


@pytest.fixture(scope="module")
def made(make_bench, tmp_path_factory) -> Bench:
    """Versions 1 (base), 2 (code) and 3 (legal, the head); medical is committed."""
    bench = make_bench(tmp_path_factory.mktemp("made") / "original")
    for seed, domain in enumerate(("code", "legal", "medical")):
        bench.commit(domain, seed)
    step(bench, "code")
    step(bench, "legal")
    return bench


def copied(bench: Bench, target: Path) -> Bench:
    subprocess.run(["cp", "-a", str(bench.root), str(target)], check=True)
    return Bench(open_workspace(target), bench.base)


def every_file(root: Path) -> dict[str, tuple[str, int]]:
    """All that is below a folder, to the bit, with the times of change."""
    return {
        path.relative_to(root).as_posix(): (
            str(path.readlink()) if path.is_symlink() else hashlib.sha256(path.read_bytes()).hexdigest(),
            path.lstat().st_mtime_ns,
        )
        for path in root.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def named(bench: Bench) -> list[str]:
    """Every place that the database of the registry names, but those of MLflow's own experiment."""
    queries = (
        "SELECT artifact_location FROM experiments WHERE name != 'Default'",
        "SELECT artifact_uri FROM runs",
        "SELECT artifact_location FROM logged_models",
        "SELECT source FROM model_versions",
        "SELECT storage_location FROM model_versions WHERE storage_location IS NOT NULL",
    )
    with sqlite3.connect(bench.workspace.private / "mlflow.db") as database:
        return [value for query in queries for (value,) in database.execute(query)]


def no_damage(bench: Bench) -> bool:
    return not any(verify(bench.project, version, data=False).findings for version in bench.registry.versions())


def test_a_copy_steps_collects_and_purges_and_the_original_stays_to_the_bit(made, tmp_path, capsys) -> None:
    before = every_file(made.root)
    copy = copied(made, tmp_path / "a copy, 100% #1")
    assert step(copy, "medical").number == 4
    assert main(["gates", "2", "--again", "--workspace", str(copy.root)]) in (0, 1)  # shown on a run of before
    collect(copy.project)
    assert main(["withdraw", "code", "--purge", "--why", "x", "--workspace", str(copy.root)]) == 0
    assert every_file(made.root) == before
    assert [version.number for version in copy.registry.versions()] == [1, 2, 3, 4, 5]
    here = copy.workspace.artifacts.as_uri()
    assert all(place.startswith(f"{here}/tiny") for place in named(copy))
    assert not (copy.registry.folder(copy.registry.version(2)) / "state" / "contribution").exists()
    assert (made.registry.folder(made.registry.version(2)) / "state" / "contribution").is_dir()
    assert no_damage(copy)


def test_a_moved_workspace_works_and_mlflow_alone_finds_its_versions(made, tmp_path) -> None:
    first = copied(made, tmp_path / "before")
    shutil.move(first.root, tmp_path / "after")
    moved = Bench(open_workspace(tmp_path / "after"), made.base)
    assert step(moved, "medical").number == 4
    assert not first.root.exists()
    assert no_damage(moved)
    loading = (sys.executable, "-c", LOADING, moved.registry.tracking_uri)
    found = subprocess.run(loading, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    assert Path(found).is_relative_to(moved.root)


def test_a_copy_of_a_copy_with_two_lineages_is_brought_here_whole(made, tmp_path) -> None:
    one = copied(made, tmp_path / "one")
    one.set("name: tiny", "name: other")
    one.register_root()
    two = copied(one, tmp_path / "two")
    before = every_file(one.root)
    assert [lineage.model_name for lineage in two.registry.lineages()] == ["other", "tiny"]
    assert all(place.startswith(two.workspace.artifacts.as_uri()) for place in named(two))
    assert every_file(one.root) == before


def test_a_copy_whose_registry_cannot_be_written_is_refused_and_not_read_elsewhere(made, tmp_path, monkeypatch) -> None:
    copy = copied(made, tmp_path / "copy")
    real = sqlite3.connect

    def read_only(database: str, **options):
        return real(database.replace("mode=rw", "mode=ro"), **options)

    monkeypatch.setattr("flows.registry.sqlite.sqlite3.connect", read_only)
    with pytest.raises(RegistryError, match=r"mlflow\.db: attempt to write a readonly database"):
        copy.registry.head()


def test_what_a_database_names_outside_of_the_workspace_is_neither_deleted_nor_written(made, tmp_path) -> None:
    copy, other = copied(made, tmp_path / "copy"), copied(made, tmp_path / "other")
    for bench in (copy, other):
        assert bench.registry.head().number == 3
    with sqlite3.connect(copy.workspace.private / "mlflow.db") as database:  # as if made by hand, or by somebody else
        here, there = copy.workspace.artifacts.as_uri(), other.workspace.artifacts.as_uri()
        for place in ("runs.artifact_uri", "logged_models.artifact_location", "model_versions.source"):
            table, column = place.split(".")
            database.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (here, there))
    before = every_file(other.root)
    with pytest.raises(RegistryError, match=r"other.*/state/sum is not among the artifacts of this workspace"):
        collect(copy.project)
    assert main(["gates", "2", "--again", "--workspace", str(copy.root)]) == 2
    assert every_file(other.root) == before
    assert not copy.registry.version(2).sum_dropped  # it says so of no version


@pytest.mark.parametrize("place", [".copal", ".copal/artifacts", ".copal/mlflow.db"])
def test_a_place_of_copal_that_is_a_link_out_of_the_workspace_is_refused(made, tmp_path, place) -> None:
    copy = copied(made, tmp_path / "copy")
    outside = tmp_path / "outside"
    (copy.root / place).rename(outside)
    (copy.root / place).symlink_to(outside)
    with pytest.raises(WorkspaceError, match=rf"{place} is a link that leads out of the workspace, to {outside}"):
        open_workspace(copy.root)


def test_a_copy_does_not_end_what_runs_in_the_original(made, tmp_path) -> None:
    text = (
        '{"supervisor": {"name": "copal up", "pid": 1, "started": 0.0}, "children": [], "workspace": "%s", '
        '"prefect": "http://127.0.0.1:1/api", "registry": "http://127.0.0.1:2", "ready": true}'
    )
    original = copied(made, tmp_path / "original")
    (original.workspace.private / "up.json").write_text(text % original.root)
    copy = copied(original, tmp_path / "copy")
    assert read_stack(original.workspace) is not None
    assert read_stack(copy.workspace) is None
    assert not down(copy.workspace)
    shutil.rmtree(original.root)  # then it was moved, and what runs is its own
    assert read_stack(copy.workspace) is not None
