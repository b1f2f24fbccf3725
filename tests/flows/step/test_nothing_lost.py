"""What is finished is not done again, whatever went wrong after it: a full disk, a dead server, a cancelled run."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mlflow import MlflowClient

from copal import survey, walk
from copal.errors import NumericsError
from flows.data.dataset import UnusableDataError
from flows.ledger.errors import ClaimLostError
from flows.registry.errors import RegistryError
from flows.step import run
from flows.step.gc import collect
from support.toys import expire_claims, holder, step
from support.waiting import work


def domains(bench) -> list[str | None]:
    return [version.tags.get("copal.domain") for version in bench.registry.versions()]


def staged(bench) -> list[str]:
    return sorted(path.name for folder in bench.workspace.runs.iterdir() for path in folder.iterdir())


@pytest.fixture
def not_again(monkeypatch) -> Callable[[str], None]:
    """not_again("prune_domain"): from now on that task must not run."""

    def forbid(name: str) -> None:
        def called(*args, **kwargs):
            raise AssertionError(f"{name} ran again")

        monkeypatch.setattr(run, name, called)

    return forbid


def test_a_version_that_is_pruned_is_not_pruned_again(bench, monkeypatch, not_again):
    bench.commit("code", 0)
    stop_after_pruning(bench, monkeypatch)
    assert staged(bench) == ["step.json", "version"]
    not_again("prune_domain")
    assert step(bench).number == 2
    assert list(bench.workspace.runs.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "disk"), ClaimLostError("claim")])
def test_a_step_that_something_ends_while_it_prunes_goes_on_from_its_last_whole_block(bench, monkeypatch, error):
    bench.commit("code", 0)
    stop_at_block(bench, monkeypatch, error)
    assert staged(bench) == ["step.json", "unfinished"]
    began = []
    monkeypatch.setattr(survey, "take_statistics", lambda *_: pytest.fail("statistics were taken again"))
    monkeypatch.setattr(walk, "_solve", lambda *args, real=walk._solve: began.append(args) or real(*args))
    assert step(bench).number == 2
    assert len(began) == 1, "of two blocks"
    assert list(bench.workspace.runs.iterdir()) == []


@pytest.mark.parametrize("error", [NumericsError("nan"), UnusableDataError("text"), KeyError("bug")])
def test_what_would_end_a_step_again_leaves_nothing_to_go_on_from(bench, monkeypatch, error):
    bench.commit("code", 0)
    stop_at_block(bench, monkeypatch, error)
    assert list(bench.workspace.runs.iterdir()) == []
    assert step(bench).number == 2


def test_the_disk_holds_unfinished_blocks_of_one_step_at_a_time(bench, monkeypatch):
    bench.commit("code", 0)
    bench.commit("legal", 1)
    stop_at_block(bench, monkeypatch, KeyboardInterrupt())
    stop_at_block(bench, monkeypatch, KeyboardInterrupt(), "legal")
    assert staged(bench) == ["step.json", "step.json", "unfinished"]


def stop_at_block(bench, monkeypatch, error: BaseException, domain: str = "code") -> None:
    """The first block is pruned, and then something happens."""

    def tell(stage: str, done: int, total: int) -> None:
        if stage == "prune":
            raise error

    with pytest.raises(type(error)):
        run.run_step(bench.project, domain, None, run.plain_tasks(tell))


def test_what_another_copal_staged_is_not_gone_on_with(bench, monkeypatch, not_again):
    bench.commit("code", 0)
    stop_after_pruning(bench, monkeypatch)
    monkeypatch.setattr(
        "flows.step.staging.code_version", lambda: {"version": "0.0.1", "git_commit": None, "dirty": None}
    )
    not_again("prune_domain")
    with pytest.raises(AssertionError, match="prune_domain ran again"):
        step(bench)


def test_what_was_staged_in_another_dtype_is_not_gone_on_with(bench, monkeypatch, not_again):
    """The settings say `auto`, and another machine goes on: the record would tell the wrong dtype of its figures."""
    bench.commit("code", 0)
    stop_after_pruning(bench, monkeypatch)
    monkeypatch.setattr("flows.step.staging.forward_dtype", lambda settings: "bfloat16")
    not_again("prune_domain")
    with pytest.raises(AssertionError, match="prune_domain ran again"):
        step(bench)


def test_a_staged_version_that_is_damaged_is_made_anew(bench, monkeypatch):
    bench.commit("code", 0)
    stop_after_pruning(bench, monkeypatch)
    (manifest,) = bench.workspace.runs.glob("*/version/state/manifest.json")
    manifest.write_text("{")
    assert step(bench).number == 2


def test_what_another_lineage_staged_is_left_alone(bench, monkeypatch):
    bench.commit("code", 0)
    stop_after_pruning(bench, monkeypatch)
    bench.set("name: tiny", "name: other")
    bench.register_root()
    assert step(bench).number == 2
    collect(bench.project)
    assert staged(bench) == ["step.json", "version"]
    bench.set("name: other", "name: tiny")
    assert step(bench).number == 2
    assert list(bench.workspace.runs.iterdir()) == []


def stop_after_pruning(bench, monkeypatch) -> None:
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "evaluate_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            step(bench)


@contextmanager
def small_disk(folder: Path, size: int, monkeypatch) -> Iterator[None]:
    """A file system of `size` bytes at `folder` where this system lets us mount one; else every large write fails.

    Containers of a CI often may not mount: then `os.write` is not reached by the libraries' native code, and what fails
    is what copal itself calls to write.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if shutil.which("mount") and subprocess.run(command, capture_output=True, check=False).returncode == 0:
        print("disk full: a tmpfs")
        try:
            yield
        finally:
            subprocess.run(["umount", str(folder)], check=True)
        return
    print("disk full: injected ENOSPC")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

    with monkeypatch.context() as patch:
        for place in ("copal.checkpoint.save_file", "shutil.copyfile", "shutil.copy2"):
            patch.setattr(place, full)
        yield


def test_a_disk_that_is_full_while_pruning_loses_nothing(bench, monkeypatch):
    bench.commit("code", 0)
    bench.commit("legal", 1)
    step(bench)
    with small_disk(bench.workspace.runs, 100_000, monkeypatch), pytest.raises(OSError) as failed:
        step(bench, "legal")
    assert failed.value.errno == errno.ENOSPC
    assert domains(bench) == [None, "code"]
    assert step(bench, "legal").number == 3
    assert domains(bench) == [None, "code", "legal"]


def test_a_disk_that_is_full_while_registering_loses_nothing_and_nothing_is_computed_again(
    bench, monkeypatch, not_again
):
    bench.commit("code", 0)
    models = bench.workspace.artifacts / "tiny" / "models"
    kept = bench.root / "kept"
    shutil.move(models, kept)
    try:
        with small_disk(models, 100_000, monkeypatch):
            (models / next(kept.iterdir()).name).symlink_to(next(kept.iterdir()))
            with pytest.raises(RegistryError, match="No space left"):
                step(bench)
    finally:
        models.rmdir()
        shutil.move(kept, models)
    assert domains(bench) == [None]
    assert staged(bench) == ["evaluation.json", "step.json", "version"]
    not_again("prune_domain")
    not_again("evaluate_step")
    assert step(bench).number == 2


@pytest.mark.parametrize(
    "call", ["log_model_artifacts", pytest.param("log_batch", marks=pytest.mark.soak), "create_model_version"]
)
def test_a_server_that_dies_during_a_registration_loses_nothing_and_nothing_is_computed_again(
    bench, mlflow_server, monkeypatch, not_again, call
):
    monkeypatch.setenv("COPAL_REGISTRY_URI", mlflow_server.uri)
    monkeypatch.setenv("COPAL_REGISTRY_ARTIFACTS", str(mlflow_server.folder / "stored"))
    monkeypatch.setenv("COPAL_LEDGER_URI", f"sqlite:///{bench.root}/.copal/ledger.db")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    bench.set("name: tiny", f"name: dies-in-{call}")
    bench.register_root()
    bench.commit("code", 0)
    real = getattr(MlflowClient, call)

    def dies(*args, **kwargs):
        mlflow_server.kill()
        return real(*args, **kwargs)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, call, dies)
            with pytest.raises(RegistryError):
                step(bench)
        with pytest.raises(RegistryError):
            step(bench)
    finally:
        mlflow_server.start()
    assert domains(bench) == [None]
    assert "evaluation.json" in staged(bench)
    expire_claims(bench.project)  # nobody could free the lineage

    not_again("prune_domain")
    not_again("evaluate_step")
    step(bench)
    assert domains(bench) == [None, "code"]
    assert step(bench) is None
    versions = bench.registry.versions()
    client = MlflowClient(tracking_uri=mlflow_server.uri, registry_uri=mlflow_server.uri)
    everything = client.search_model_versions(f"name = 'dies-in-{call}'")
    assert sorted(int(version.version) for version in everything) == [version.number for version in versions]


def test_a_step_past_its_time_limit_is_stopped_and_frees_the_lineage(bench, monkeypatch, prefect):
    from flows.adapt import adapt
    from flows.runs.limit import TimeLimitError

    bench.commit("code", 0)
    bench.set("model: {name: tiny", "run: {time_limit: 0.5}\nmodel: {name: tiny")
    with monkeypatch.context() as patch:
        patch.setattr("flows.step.run.evaluate_step", lambda *args: work(60.0))
        with pytest.raises(TimeLimitError, match=r"run.time_limit, 0.5 s"):
            adapt(str(bench.root), "code")
    assert holder(bench.project)["held"] == 0
    assert domains(bench) == [None]
