"""Kills a step at a named point, or at any time: what the tests of kills and races run in processes of their own.

A point is a call of the code that does the work, wrapped so that something happens before or after it: the process
kills itself (no handler runs, nothing is flushed), or what it would leave behind is copied and it goes on. Processes
are forked from one that has the libraries imported.
"""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from flows.pending.plan import plan
from flows.project import open_project
from flows.start.add import add_domain
from flows.step.run import plain_tasks, run_step
from support.benches import copy_workspace

_CONTEXT = multiprocessing.get_context("forkserver")
_PRELOADED = [  # all that a step imports: what is missing here, each process imports anew, which is half of its time
    "torch", "transformers", "pyarrow.parquet", "mlflow", "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.store.model_registry.sqlalchemy_store", "dvc.repo", "dvc.api", "flows.step.distributed", "flows.step.run",
    "alembic.command", "copal.generate", "dulwich.worktree", "dvc.cachemgr", "dvc.data_cloud", "dvc_render.vega",
    "jinja2", "matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg", "matplotlib.figure",
    "matplotlib.projections", "matplotlib.style", "mlflow.pyfunc", "networkx", "pygit2", "ruamel.yaml", "scmrepo.fs",
    "transformers.convert_slow_tokenizer", "transformers.models.llama.modeling_llama",
    "transformers.tokenization_utils_tokenizers", "copal.calibration", "dvc.repo.artifacts", "dvc.repo.datasets",
    "dvc.repo.index", "dvc.repo.plots", "dvc.repo.stage", "mlflow.store.model_registry.sqlalchemy_workspace_store",
    "mlflow.store.tracking.sqlalchemy_workspace_store", "rich.console", "scipy.io",
    "transformers.models.auto.tokenization_auto",
]  # fmt: skip


@dataclass(frozen=True)
class Point:
    """A place to die: `when` ("before" or "after") the `nth` call of `target` ("module:Name.attribute")."""

    target: str
    when: str
    nth: int = 1
    of: str = ""  # only calls with this in their arguments count
    signal: int = signal.SIGKILL

    def __str__(self) -> str:
        place = self.target.split(":")[1] + (f"({self.of})" if self.of else "")
        return f"{self.when} {place}" + (f" #{self.nth}" if self.nth > 1 else "")


def _both(target: str, nth: int = 1, of: str = "") -> list[Point]:
    return [Point(target, when, nth, of) for when in ("before", "after")]


# In the order in which a step comes by.
POINTS = [
    *_both("flows.ledger.claims:take"),
    *_both("flows.step.staging:write_atomic", of="step.json"),
    Point("flows.data.fetch:_download", "before"),
    Point("flows.data.fetch:_verify", "after"),
    Point("flows.data.fetch:fetched_once", "after"),
    Point("copal.checkpoint:CheckpointWriter.write", "after"),
    Point("copal.resume:Unfinished.finish", "after"),
    Point("copal.state:StateWriter.contribution", "after"),
    *_both("copal.resume:Unfinished.finish", of="statistics-00000"),
    Point("copal.state:StateWriter.sum", "after", 2),
    *_both("copal.resume:Unfinished.finish", of="gradient-00001"),
    Point("copal.resume:Unfinished.finish", "after", of="survey"),
    Point("copal.resume:Unfinished.finish", "after", of="prune-00000"),
    Point("copal.checkpoint:CheckpointWriter.write", "after", 3),
    Point("copal.checkpoint:CheckpointWriter.finish", "after"),
    Point("copal.state:StateWriter.finish", "after"),
    *_both("pathlib:Path.rename", of="unfinished"),
    *_both("flows.step.work:write_atomic", of="evaluation.json"),
    Point("flows.registry.publish:write_record", "after"),
    Point("mlflow:MlflowClient.create_run", "after"),
    *_both("mlflow:MlflowClient.create_logged_model"),
    *_both("mlflow:MlflowClient.log_model_artifacts"),
    Point("mlflow:MlflowClient.finalize_logged_model", "after"),
    Point("mlflow:MlflowClient.log_inputs", "after"),
    Point("mlflow:MlflowClient.log_outputs", "after"),
    Point("mlflow:MlflowClient.log_batch", "after"),
    Point("mlflow:MlflowClient.set_terminated", "after"),
    *_both("flows.ledger.claims:Claim.seal"),
    *_both("mlflow:MlflowClient.create_model_version"),
    Point("mlflow:MlflowClient.set_logged_model_tags", "after"),
    Point("mlflow:MlflowClient.search_logged_models", "after"),
    *_both("flows.ledger.claims:Claim.unseal"),
    *_both("flows.step.run:discard"),
    *_both("flows.ledger.claims:take", 2),
    *_both("flows.ledger:Ledger.append"),
    *_both("flows.registry.registry:Registry.anchor_log"),
    *_both("mlflow:MlflowClient.set_registered_model_alias"),
    *_both("flows.ledger:Ledger.settle"),
    *_both("flows.ledger:Ledger.append", of="promotion"),
    *_both("flows.registry.registry:Registry.anchor_log", 2),
    *_both("mlflow:MlflowClient.set_registered_model_alias", of="champion"),
    *_both("flows.ledger:Ledger.settle", of="champion"),
    *_both("flows.registry.store:Store.upload"),
    Point("mlflow:MlflowClient.log_batch", "after", 2),
    Point("mlflow:MlflowClient.update_model_version", "after"),
    *_both("mlflow:MlflowClient.set_model_version_tag", of="copal.log_entry"),
    *_both("mlflow:MlflowClient.set_model_version_tag", of="copal.gates"),
    *_both("flows.ledger.claims:Claim.end"),
    *_both("flows.ledger.claims:Claim.end", 2),
]  # fmt: skip


def process(target: Callable[..., None], *arguments: Any) -> Any:
    """A process that calls `target`, forked from one that has the libraries imported."""
    made = _CONTEXT.Process(target=target, args=arguments, daemon=True)
    _CONTEXT.set_forkserver_preload(_PRELOADED)
    made.start()
    return made


def start(root: Path, domain: str, rev: str, point: Point | None = None) -> Any:
    """A process that takes one step; dies at `point`."""
    return process(_step, str(root), domain, rev, point)


def start_add(root: Path, domain: str, path: Path, point: Point) -> Any:
    """A process that puts `path` in the place of a domain's data; dies at `point`."""
    return process(_add, str(root), domain, path, point)


def record(root: Path, domain: str, rev: str, points: Sequence[Point], images: Path) -> None:
    """Let a process take one step to its end, and keep what a kill -9 at each point would have left of the workspace.

    At a point the process is stopped as a whole, with all of its threads, the files of the workspace `root` are copied
    to the folder of the point's index in `images`, and the process goes on. Such an image has what the process has
    written so far, be it half of a file or a transaction of SQLite with its hot journal, as a killed process leaves it.
    What a power cut would lose of it, pages that nobody flushed, is in the image, as it is after a kill -9.
    """
    ours, its = _CONTEXT.Pipe()
    child = process(_recorded, str(root), domain, rev, list(points), its)
    its.close()
    pause = threading.Event()
    while True:
        try:
            number = ours.recv()
        except EOFError:
            break
        os.kill(child.pid, signal.SIGSTOP)
        while psutil.Process(child.pid).status() != psutil.STATUS_STOPPED:
            pause.wait(0.001)
        copy_workspace(root, images / str(number))
        os.kill(child.pid, signal.SIGCONT)
        ours.send(number)
    child.join()
    assert child.exitcode == 0


def watch_rounds(root: str, barrier: Any, rounds: int) -> None:
    """A watcher below Prefect: whenever all are at the barrier, it takes what is pending."""
    torch.set_num_threads(1)
    for _ in range(rounds):
        barrier.wait()
        project = open_project(root)
        for version in plan(project).pending:
            run_step(project, version.domain, version.git_rev, plain_tasks())
        barrier.wait()


def _step(root: str, domain: str, rev: str, point: Point | None) -> None:
    torch.set_num_threads(1)
    if point:
        _arm(point, lambda: os.kill(os.getpid(), point.signal))
    run_step(open_project(root), domain, rev, plain_tasks())


def _add(root: str, domain: str, path: Path, point: Point) -> None:
    _arm(point, lambda: os.kill(os.getpid(), point.signal))
    add_domain(open_project(root), domain, [path], replace=True)


def _recorded(root: str, domain: str, rev: str, points: Sequence[Point], recorder: Any) -> None:
    torch.set_num_threads(1)

    def copied(number: int) -> None:
        recorder.send(number)
        recorder.recv()

    for number, point in enumerate(points):
        _arm(point, functools.partial(copied, number))
    run_step(open_project(root), domain, rev, plain_tasks())


def _arm(point: Point, do: Callable[[], None]) -> None:
    module, _, path = point.target.partition(":")
    owner: Any = importlib.import_module(module)
    *owners, name = path.split(".")
    for part in owners:
        owner = getattr(owner, part)
    setattr(owner, name, _doing(getattr(owner, name), point, do))


def _doing(call: Callable[..., Any], point: Point, do: Callable[[], None]) -> Callable[..., Any]:
    calls = 0

    @functools.wraps(call)
    def called(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        if point.of not in " ".join(map(str, args)):
            return call(*args, **kwargs)
        calls += 1
        number = calls
        if number == point.nth and point.when == "before":
            do()
        result = call(*args, **kwargs)
        if number == point.nth and point.when == "after":
            do()
        return result

    return called
