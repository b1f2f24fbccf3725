"""The machines of a step come together: all of them or none, and what is wrong is one line on either side."""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from copal.errors import NumericsError, ResourceError, SettingsError
from flows.project import project_of
from flows.settings import ModelSettings, RunSettings, Settings
from flows.step import gang, node
from flows.step.launch import Fault, Place
from flows.step.resolve import Inputs
from flows.workspace import Workspace
from support.servers import free_port


@pytest.fixture
def address() -> str:
    return f"127.0.0.1:{free_port()}"


@pytest.fixture(autouse=True)
def impatient(monkeypatch) -> None:
    monkeypatch.setattr(gang, "_BEAT", 0.05)
    monkeypatch.setattr(gang, "_LOST", 1.5)


def settings(address: str | None, nodes: int = 2, wait: float = 20.0) -> Settings:
    return Settings(
        model=ModelSettings(nodes=nodes, dtype="float32"), run=RunSettings(nodes_address=address, nodes_wait=wait)
    )


@contextmanager
def other(address: str, number: int = 1, tasks: Callable[..., Fault | None] = lambda *_: None) -> Iterator[list[str]]:
    """A node in a thread, whose tasks `tasks` does; gives the lines with which it ended."""
    said: list[str] = []

    def run() -> None:
        try:
            node.serve(project, number, address, 20.0, lambda _: None)
        except gang.NodeError as error:
            said.append(str(error))

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as machine:
        project = project_of(Workspace(Path(machine)), settings(address))
        patch.setattr(node, "_task", tasks)
        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield said
        finally:
            thread.join()


def run(found: gang.Gang, own: Fault | None = None) -> None:
    def work(*, place: Place, over: Callable[[], bool]) -> Fault | None:
        assert (place.nodes, place.processes) == (2, 3)
        return own

    found.run({"request": {"task": "evaluate"}}, 3, work)


def come_together(given: Settings) -> None:
    with gang.open_gang(given):
        raise AssertionError


def one_task(address: str, own: Fault | None = None) -> None:
    with gang.open_gang(settings(address)) as found:
        run(found, own)


def ready(own: Fault | None) -> Callable[..., Fault | None]:
    """A node's task: has what it needs, waits for the start, and ends with `own`."""

    def task(_: Any, member: node._Node, number: int, told: Any) -> Fault | None:
        member.store.set(f"ready/{number}/{member.number}", "1")
        member.wait(f"start/{number}", f"stop/{number}")
        return own

    return task


def test_a_node_serves_tasks_until_the_step_is_over(address):
    with other(address, tasks=ready(None)) as said, gang.open_gang(settings(address)) as found:
        run(found)
        run(found)
    assert said == []


def test_a_node_that_does_not_come_is_one_line_and_nothing_is_left(address):
    with pytest.raises(gang.NodeError, match=r"1 of 2 nodes came within 0 s: run `copal node NUMBER`"):
        come_together(settings(address, wait=0.1))
    with other(address) as said, pytest.raises(gang.NodeError, match="2 of 3 nodes came"):
        come_together(settings(address, nodes=3, wait=2.0))  # the port is free again
    assert len(said) == 1
    assert said[0].startswith("node 0 ended the step: 2 of 3 nodes came")


def test_a_node_too_many_and_a_number_twice_are_one_line(address):
    with other(address, tasks=ready(None)), gang.open_gang(settings(address)):
        with other(address, number=2) as too_many, other(address, number=1) as twice:
            pass
        assert too_many == [f"node 2 is none of those at {address}: with model.nodes 2 they go to 1"]
        assert twice == [f"another machine is node 1 at {address} already: give each a number of its own"]


def test_a_node_with_other_code_is_refused(address, monkeypatch):
    codes = iter(["copal 1 with torch 1", "copal 2 with torch 1"])
    lock = threading.Lock()

    def me() -> dict[str, str]:
        with lock:
            return {"machine": "there", "code": next(codes)}

    monkeypatch.setattr(gang, "me", me)
    monkeypatch.setattr(node, "me", me)
    with other(address) as said, pytest.raises(gang.NodeError, match="give all the same image"):
        come_together(settings(address))
    assert len(said) == 1


def test_an_error_of_another_node_is_what_it_was_and_names_the_node(address):
    fault = Fault("NumericsError", ("on legal: hidden states are not finite",))
    with other(address, tasks=ready(fault)) as said, pytest.raises(NumericsError) as caught:
        one_task(address, Fault("bug", ("Connection closed by peer",)))  # which follows from it
    assert str(caught.value).startswith("on node 1 (")
    assert str(caught.value).endswith("): on legal: hidden states are not finite")
    assert said == [f"node 0 ended the step: {caught.value}"]
    with other(address, tasks=ready(Fault("killed"))), pytest.raises(ResourceError, match=r"of the step on node 1 \("):
        one_task(address, Fault("bug", ("Connection closed by peer",)))


def test_a_node_that_is_gone_ends_the_task(address):
    def die(_: Any, member: node._Node, number: int, told: Any) -> Fault | None:
        member.beats.close()  # nothing is heard of it any more
        member.wait("over")
        return None

    with other(address, tasks=die), pytest.raises(gang.NodeError, match=r"node 1 \(.*\) is gone: nothing was heard"):
        one_task(address)


def test_a_node_ends_when_node_0_is_gone(address):
    with other(address, tasks=ready(None)) as said:
        opened = gang.open_gang(settings(address))
        found = opened.__enter__()
        found.close()  # the store with all that was in it
        with pytest.raises(AttributeError):
            opened.__exit__(None, None, None)
    assert len(said) == 1
    assert said[0].startswith(f"node 0 at {address} is gone: what is finished stays here")


def test_nodes_without_an_address_are_one_line():
    with pytest.raises(gang.NodeError, match="COPAL_NODES_ADDRESS"):
        come_together(settings(None))


def test_more_processes_than_gpus_on_a_node_are_told(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    fault = node._task(None, None, 0, {"processes": 2})  # type: ignore[arg-type]
    assert fault is not None
    assert fault.kind == SettingsError.__name__


def test_a_request_gets_the_paths_of_this_machine():
    inputs = Inputs(
        base=Path("/b/base"), base_fingerprint="f", parent=Path("/b/parent"), states={2: Path("/b/2/state")}
    )
    told = {"base": "/a/base", "parent": "/a/parent/model", "new": "/a/new"}
    prune = {
        "task": "prune",
        "base": {"folder": "/a/base", "fingerprint": "f"},
        "parent": {"version": 3, "model": "/a/parent/model", "state": "/a/parent/state", "states": {"2": "/a/2/state"}},
        "out": "/a/run/version",
        "resume": "/a/run/unfinished",
    }
    evaluate = {"task": "evaluate", "jobs": [["/a/new", ["x"]], ["/a/base", ["x"]], ["/a/parent/model", ["x"]]]}
    for request in (prune, evaluate):
        made = node.localized({**told, "request": request}, inputs, Path("/b/own"))
        assert "/a/" not in json.dumps(made, default=str)
