"""copal gc on real workspaces: what can be made again goes, and the next step does not notice."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

from copal.files import locked
from flows.cli import main
from flows.lineage.files import verify_files
from flows.registry.errors import RegistryError
from flows.step import node
from flows.step.gang import NodeError
from flows.step.gc import collect
from flows.step.staging import TASK, node_lock
from support.toys import other_masks, step, weights


@pytest.fixture
def lineage(bench):
    """Versions 1 (base), 2 (code) and 3 (legal, the head); medical is committed."""
    for seed, domain in enumerate(("code", "legal", "medical")):
        bench.commit(domain, seed)
    for domain in ("code", "legal"):
        step(bench, domain)
    return bench


def folder(bench, number: int) -> Path:
    return bench.registry.folder(bench.registry.version(number))


def sums(bench, number: int) -> list[Path]:
    return sorted((folder(bench, number) / "state" / "sum").glob("*"))


def test_old_sums_go_and_the_next_step_gives_the_same_weights(lineage):
    before, contribution = sums(lineage, 3), list((folder(lineage, 2) / "state" / "contribution").iterdir())
    size = sum(path.stat().st_size for path in sums(lineage, 2))

    freed = collect(lineage.project)

    assert [(one.what, one.size) for one in freed] == [("running sum of version 2", size)]
    assert sums(lineage, 2) == []
    assert sums(lineage, 3) == before
    assert all(path.is_file() for path in contribution)
    assert collect(lineage.project) == []
    for version in lineage.registry.versions():
        record, found = lineage.registry.record(version), lineage.registry.folder(version)
        assert verify_files(record, found, sum_dropped=version.sum_dropped) == []
    step(lineage, "medical")
    with_gc = weights(lineage, 4)
    collect(lineage.project)  # the sum of 3, which the step read
    assert sums(lineage, 3) == []

    lineage.set("name: tiny", "name: without")
    lineage.register_root()
    for domain in ("code", "legal", "medical"):
        step(lineage, domain)
    without_gc = weights(lineage, 4)
    assert all(torch.equal(with_gc[name], without_gc[name]) for name in without_gc)


def test_a_step_on_a_version_whose_sum_went_gives_what_it_gave_with_it(lineage):
    uri = lineage.registry.tracking_uri
    step(lineage, "medical")
    with_sum = weights(lineage, 4)
    collect(lineage.project)
    MlflowClient(tracking_uri=uri, registry_uri=uri).delete_model_version("tiny", "4")
    assert lineage.registry.head().number == 3
    assert sums(lineage, 3) == []
    step(lineage, "medical")
    head = lineage.registry.head()
    assert head.parent == 3
    assert other_masks(with_sum, weights(lineage, head.number)) <= 1e-4


def test_what_a_killed_step_left_goes_and_a_dry_run_says_the_same_and_deletes_nothing(lineage, capsys):
    left = lineage.workspace.runs / "0123456789abcdef"
    (left / "version").mkdir(parents=True)
    (left / "version" / "model.safetensors").write_bytes(bytes(250_000))
    before, tags = lineage.snapshot(), [version.tags for version in lineage.registry.versions()]
    capsys.readouterr()
    assert main(["gc", "--dry-run", "--workspace", str(lineage.root)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert lineage.snapshot() == before
    assert ".copal/runs/0123456789abcdef: 0.2 MB" in said
    assert [version.tags for version in lineage.registry.versions()] == tags
    assert main(["gc", "--workspace", str(lineage.root)]) == 0
    assert capsys.readouterr().out.splitlines() == [*said[:-1], said[-1].replace("would free", "freed")]
    assert not left.exists()
    assert main(["gc", "--workspace", str(lineage.root)]) == 0
    assert capsys.readouterr().out == "nothing to free\n"


def left_by_node(bench, number: int, head: int) -> Path:
    """What a node that was killed in a step on version `head` leaves."""
    folder = node._folder(bench.project, number, {"model": "tiny", "key": f"{head:064x}", "head": head})
    for part in ("unfinished", TASK):
        (folder / part).mkdir()
        (folder / part / "weights").write_bytes(bytes(100_000))
    return folder


def test_what_a_killed_node_left_goes_but_not_what_one_goes_on_with_or_that_of_one_that_lives(bench):
    other, head = 7, bench.registry.head().number
    outdated, goes_on, lives = (left_by_node(bench, number, on) for number, on in ((1, other), (2, head), (3, other)))
    broken = left_by_node(bench, 4, head)
    (broken / "step.json").unlink()
    with locked(node_lock(bench.workspace, 3)):  # as the process of a node does
        expected = {str(path.relative_to(bench.root)): path for path in (outdated, goes_on / TASK, broken)}
        said = collect(bench.project, dry_run=True)
        assert all(path.is_dir() for path in expected.values())
        freed = collect(bench.project)
        assert freed == said
        assert [one.what for one in freed] == list(expected)
        assert [one.size >= 100_000 for one in freed] == [True] * 3
        assert not any(path.exists() for path in expected.values())
        assert (goes_on / "unfinished" / "weights").is_file()
        assert (lives / TASK / "weights").is_file()
        with pytest.raises(NodeError, match="another process is node 3 in "):
            node.serve(bench.project, 3, "127.0.0.1:1", 0.1, lambda _: None)
    assert [one.what for one in collect(bench.project)] == [str(lives.relative_to(bench.root))]


def test_sums_in_a_remote_store_go_with_their_copies(lineage, monkeypatch):
    size = sum(path.stat().st_size for path in sums(lineage, 2))
    stored = folder(lineage, 2)
    monkeypatch.setattr("flows.registry.artifacts.local_path", lambda uri: None)  # as if it were on another machine
    copy = folder(lineage, 2)
    with monkeypatch.context() as patch:
        patch.setattr(LocalArtifactRepository, "delete_artifacts", lambda *args: None)  # as some stores do
        with pytest.raises(RegistryError, match=r"does not let copal delete .*/state/sum"):
            collect(lineage.project)
    shutil.rmtree(copy)
    copy = folder(lineage, 2)
    assert (copy / "state" / "sum").is_dir()
    registry = lineage.registry
    assert registry.drop_sum(registry.version(2)) == 2 * size
    assert not (stored / "state" / "sum").exists()
    assert not (copy / "state" / "sum").exists()
    shutil.rmtree(copy)
    assert folder(lineage, 2) == copy  # fetched again and verified, though files of the record are gone
