"""How often MLflow is asked: each call is a request where the registry is a server."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from mlflow import MlflowClient

from flows.lineage.entries import GateResult, GatesDetails
from flows.pending.status import status
from flows.project import append_log, open_project
from flows.step.run import plain_tasks, run_step
from support.registries import a_record, staged


@contextmanager
def counted() -> Iterator[list[str]]:
    """The calls of MLflow's client, by name; what these call in their turn does not count."""
    calls: list[str] = []
    inside = threading.local()

    def counting(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def called(*args: Any, **kwargs: Any) -> Any:
            if getattr(inside, "call", False):
                return method(*args, **kwargs)
            calls.append(name)
            inside.call = True
            try:
                return method(*args, **kwargs)
            finally:
                inside.call = False

        return called

    with pytest.MonkeyPatch.context() as patch:
        for name, method in inspect.getmembers(MlflowClient, inspect.isfunction):
            if not name.startswith("_"):
                patch.setattr(MlflowClient, name, counting(name, method))
        yield calls


def test_a_step_with_gates_makes_at_most_30_calls(bench) -> None:
    gates = "gates: {forgetting: null, champion: null, dense: null, improvement: false, promote: auto}"
    bench.set("model: {name: tiny", f"{gates}\nmodel: {{name: tiny")
    for seed, domain in enumerate(("code", "legal")):
        bench.commit(domain, seed)
    assert run_step(bench.project, "code", None, plain_tasks()) is not None
    with counted() as calls:
        made = run_step(open_project(bench.root), "legal", None, plain_tasks())
    assert made is not None
    assert all(gate.passed for gate in made.gates)
    assert bench.registry.alias("champion") == made.number
    assert "create_model_version" in calls
    assert len(calls) <= 30, calls


def test_the_status_of_ten_versions_makes_at_most_5_calls(bench, tmp_path) -> None:
    project = bench.project
    registry = project.registry
    base = registry.record(registry.head()).base
    for number in range(2, 11):
        folder, parent = staged(tmp_path / str(number), str(number)), registry.head()
        record = a_record(folder, parent, [f"{letter}omain" for letter in "abcdefghi"[: number - 1]], base=base)
        made = registry.register(folder, record, parent=parent, expected_head=parent.number)
        result = GateResult(name="dense", passed=True, value=1.5, limit=2.0, detail="fine")
        details = GatesDetails(record=made.digest, passed=True, promote="manual", gates=(result,))
        append_log(project, "gates", version=number, details=details)
    with counted() as calls:
        found = status(open_project(bench.root))
    assert [version["version"] for version in found["versions"]] == list(range(1, 11))
    assert 0 < len(calls) <= 5, calls
