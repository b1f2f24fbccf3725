"""What people do by hand in MLflow never sticks a lineage: it is said, with the remedy, and the next step works."""

from __future__ import annotations

import sqlite3
import subprocess
import threading

import pytest
from mlflow import MlflowClient

from flows.cli import main
from flows.gates.champion import make_champion
from flows.pending.plan import plan
from flows.project import read_log
from flows.registry.errors import RegistryError
from flows.step.gc import collect
from flows.step.run import plain_tasks, run_withdrawal
from flows.verification.verify import verify
from flows.workspace import open_workspace
from support.benches import Bench
from support.toys import step


@pytest.fixture(scope="module")
def made(make_bench, tmp_path_factory) -> Bench:
    """Versions 1 (base), 2 (code, the champion) and 3 (legal, the head); medical is committed."""
    bench = make_bench(tmp_path_factory.mktemp("made") / "original")
    # The weights are random: what a step does to perplexity means nothing.
    gates = "gates: {forgetting: null, champion: null, dense: null, improvement: false, generation: false}"
    bench.set("model: {name: tiny", f"{gates}\nmodel: {{name: tiny")
    for seed, domain in enumerate(("code", "legal", "medical")):
        bench.commit(domain, seed)
    step(bench, "code")
    step(bench, "legal")
    make_champion(bench.project, 2, why=None, force=False, tell=None)
    return bench


@pytest.fixture
def bench(made, tmp_path) -> Bench:
    subprocess.run(["cp", "-a", str(made.root), str(tmp_path / "workspace")], check=True)
    return Bench(open_workspace(tmp_path / "workspace"), made.base)


def by_hand(bench: Bench) -> MlflowClient:
    assert bench.registry.head() is not None
    uri = bench.registry.tracking_uri
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def findings(bench: Bench, number: int) -> tuple[str, ...]:
    return verify(bench.project, bench.registry.version(number), data=False).findings


def next_step(bench: Bench) -> int:
    """The number of the next version, whose gates passed."""
    made = step(bench, "medical")
    assert all(gate.passed for gate in made.gates), made.gates
    return made.number


@pytest.mark.parametrize("for_good", [False, True])
def test_a_run_deleted_also_for_good(bench, for_good: bool) -> None:
    client, run = by_hand(bench), bench.registry.version(2).run_id
    client.delete_run(run)
    if for_good:  # as `mlflow gc` does
        client._tracking_client.store._hard_delete_run(run)
    assert main(["gates", "2", "--again", "--workspace", str(bench.root)]) == 0
    assert any(f"mlflow runs restore --run-id {run}" in found for found in findings(bench, 2))
    assert next_step(bench) == 4
    assert make_champion(bench.project, 4, why=None, force=False, tell=None) is not None
    assert run_withdrawal(bench.project, "legal", "x", plain_tasks(), purge=True).made.number == 5


def test_a_version_deleted_in_the_middle(bench) -> None:
    by_hand(bench).delete_model_version("tiny", "2")
    assert [note for note in plan(bench.project).notes if note.startswith("version 2 was deleted in MLflow")]
    assert "version 3: its parent 2 is no version of tiny" in findings(bench, 3)
    assert next_step(bench) == 4
    done = run_withdrawal(bench.project, "code", "x", plain_tasks(), purge=True)  # whose contribution 2 holds
    assert done.made.number == 5
    assert done.purged.deleted == (2,)
    (deleted,) = bench.registry.deleted()
    assert (deleted.number, deleted.parent) == (2, 1)
    assert not (bench.registry.folder(deleted) / "state" / "contribution").exists()


def test_the_base_deleted(bench) -> None:
    folder = bench.registry.folder(bench.registry.root())
    by_hand(bench).delete_model_version("tiny", "1")
    assert bench.registry.folder(bench.registry.root()) == folder  # and not the pruned version that is the oldest now
    assert next_step(bench) == 4


def test_the_base_deleted_with_its_files_is_one_line(bench) -> None:
    client, model = by_hand(bench), bench.registry.root().tags["copal.logged_model"]
    client.delete_model_version("tiny", "1")
    client.delete_logged_model(model)
    with pytest.raises(RegistryError, match="has versions, and no dense base any more"):
        step(bench, "medical")


def test_the_model_deleted_and_the_workspace_initialised_again(bench) -> None:
    by_hand(bench).delete_registered_model("tiny")
    assert bench.registry.head() is None
    bench.register_root()
    made = step(bench, "code")
    assert [version.number for version in bench.registry.versions()] == [1, made.number]
    assert all(gate.passed for gate in made.gates), made.gates
    assert next_step(bench) == made.number + 1
    assert make_champion(bench.project, made.number, why="anew", force=True, tell=None) is not None
    collect(bench.project)


def test_the_experiment_deleted_is_said_with_the_command_that_brings_it_back(bench) -> None:
    client = by_hand(bench)
    number = client.get_experiment_by_name("tiny").experiment_id
    client.delete_experiment(number)
    with pytest.raises(RegistryError, match=rf"mlflow experiments restore -x {number}`"):
        step(bench, "medical")
    client.restore_experiment(number)
    assert next_step(bench) == 4


def test_aliases_deleted(bench) -> None:
    client = by_hand(bench)
    for alias in ("champion", "challenger"):
        client.delete_registered_model_alias("tiny", alias)
    assert any("champion names no version, the log says version 2" in found for found in findings(bench, 3))
    assert next_step(bench) == 4
    assert bench.registry.alias("challenger") == 4
    assert make_champion(bench.project, 4, why="it was deleted", force=True, tell=None) is not None


@pytest.mark.parametrize("tag", ["copal.logged_model", "copal.base_fingerprint", "copal.parent_version"])
def test_a_tag_made_useless_is_one_line_that_names_it(bench, tag: str) -> None:
    by_hand(bench).set_model_version_tag("tiny", "2", tag, "x" if tag == "copal.parent_version" else "")
    assert main(["status", "--workspace", str(bench.root)]) == 2
    with pytest.raises(RegistryError, match=rf"version 2 of tiny: somebody edited or deleted its tag {tag} in MLflow"):
        step(bench, "medical")


def test_the_number_of_a_log_entry_edited_is_set_back(bench) -> None:
    before = bench.registry.version(2).log_entry
    by_hand(bench).set_model_version_tag("tiny", "2", "copal.log_entry", "nine")
    assert next_step(bench) == 4
    assert bench.registry.version(2).log_entry == before


def test_a_parent_edited_deletes_no_version(bench) -> None:
    client = by_hand(bench)
    client.set_model_version_tag("tiny", "2", "copal.parent_version", "0")
    collect(bench.project)
    assert client.get_model_version("tiny", "2").tags["copal.parent_version"] == "0"
    client.set_model_version_tag("tiny", "2", "copal.parent_version", "1")
    assert next_step(bench) == 4


def test_the_anchor_of_the_log_edited_says_what_to_do(bench) -> None:
    by_hand(bench).set_registered_model_tag("tiny", "copal.log_head", "x")
    assert main(["promote", "3", "--workspace", str(bench.root)]) == 2
    with pytest.raises(Exception, match="bring ledger and registry back from one backup"):
        read_log(bench.project)


def test_a_locked_database_is_waited_for_and_then_said_to_be_locked(bench, monkeypatch) -> None:
    other = sqlite3.connect(bench.workspace.private / "mlflow.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    timer = threading.Timer(0.5, other.rollback)
    timer.start()
    assert bench.registry.head().number == 3  # it waited
    timer.join()
    monkeypatch.setattr("flows.registry.sqlite._BUSY", 0.1)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(RegistryError, match="database is locked; it is in use by another process, and whole") as error:
        bench.registry.head()
    assert "bring back a copy" not in str(error.value)
    other.close()
    assert bench.registry.head().number == 3
