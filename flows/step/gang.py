"""The machines that take a step together, as the first of them sees it: node 0, which holds the lineage.

Node 0 opens torch's TCPStore, and the others (`flows.step.node`) come to it: all of them, or there is no step. What
goes through it is JSON, never a tensor:

    gang                 how many nodes there are
    come/K               who node K is: its machine, the code that it runs
    beat/K               a number that rises each second, for as long as the node lives
    task/T               what is to be done
    ready/T/K            node K has what the task reads
    start/T              the port of the launchers of this task: all of them start their processes
    stop/T               it failed on some node: the others end it
    ended/T/K            how it ended on node K
    over                 the step is over, and why where it failed
    left/K               node K has heard that

A machine that is gone does not say so: a collective of the processes would wait for it for a day. So each looks at the
other's beat. The store knows no users: who reaches its port could take part. It belongs into a network of one's own, as
the ports of torch's processes do (SECURITY.md).
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import timedelta
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any, Protocol

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]  # it is documented there

from copal.errors import CopalError
from flows.machine import code_version
from flows.settings import Settings
from flows.step.launch import Fault, Place, raise_fault

__all__ = ["POLL", "Beats", "Gang", "Helpers", "NodeError", "connect", "me", "open_gang", "split_address"]

POLL = 0.2  # seconds between two looks at the store
_ANSWER = timedelta(seconds=30)  # in which a store that is there answers
_BEAT = 1.0  # seconds
_LOST = 15.0  # seconds without a beat after which a node is gone
_FAREWELL = 5.0  # seconds in which the others hear that the step is over


class NodeError(CopalError):
    """A node did not come, is gone, or does not fit to the others."""


class Work(Protocol):
    """How node 0 runs its own processes: `flows.step.launch.run_processes` of a folder."""

    def __call__(self, *, place: Place, over: Callable[[], bool]) -> Fault | None: ...


class Beats:
    """Says each second that this node lives, and hears it of others, in a thread."""

    def __init__(self, store: TCPStore, node: int) -> None:
        """`store`: nobody else's, for it waits for answers."""
        self._store, self._node = store, node
        self._heard: dict[int, tuple[bytes, float]] = {}
        self._answered = time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def hear(self, node: int) -> None:
        """Listen for that node from now on."""
        self._heard.setdefault(node, (b"", time.monotonic()))

    def lost(self, node: int) -> bool:
        """Whether nothing was heard of the node for too long."""
        return time.monotonic() - min(self._answered, self._heard[node][1]) > _LOST

    def close(self) -> None:
        self._done.set()
        self._thread.join(timeout=_LOST)

    def _run(self) -> None:
        number = 0
        while not self._done.wait(_BEAT):
            number += 1
            try:
                self._store.set(f"beat/{self._node}", str(number))
                for node, (last, _) in list(self._heard.items()):
                    beat = value(self._store, f"beat/{node}")
                    if beat is not None and beat != last:
                        self._heard[node] = beat, time.monotonic()
            except DistError:  # whoever has the store is gone
                self._answered = float("-inf")
                return
            self._answered = time.monotonic()


class Gang:
    """The other nodes of a step, numbered from 1, all of them there. Made by `open_gang`."""

    def __init__(self, store: TCPStore, beats: Beats, host: str, names: Mapping[int, str]) -> None:
        self._store, self._beats, self._host, self._names = store, beats, host, names
        self._tasks = 0

    def run(self, told: Mapping[str, Any], processes: int, work: Work) -> None:
        """Do one task on all nodes.

        Args:
            told: what the others are told of it.
            processes: on each node.
            work: runs this node's.

        Raises:
            NodeError: a node is gone.
            CopalError, OSError: what ended a process, with the node where that was.
        """
        task, self._tasks = self._tasks, self._tasks + 1
        nodes = len(self._names) + 1
        self._store.set(
            f"task/{task}", json.dumps({**told, "processes": processes, "nodes": nodes, "host": self._host})
        )
        found: dict[int, Fault | None] = {}
        try:
            while not all(value(self._store, f"ready/{task}/{node}") for node in self._names):
                if self._trouble(task):
                    break
                time.sleep(POLL)
            else:
                port = _free_port()
                self._store.set(f"start/{task}", str(port))
                place = Place(processes=processes, nodes=nodes, host=self._host, port=port)
                found[0] = work(place=place, over=lambda: self._trouble(task))
        finally:
            if 0 not in found or found[0] is not None or self._trouble(task):
                self._store.set(f"stop/{task}", "1")
        self._raise(found | self._ended(task))

    def _trouble(self, task: int) -> bool:
        """Whether a node is gone, or cannot go on."""
        return any(
            self._beats.lost(node) or (value(self._store, f"ended/{task}/{node}") or b"null") != b"null"
            for node in self._names
        )

    def _ended(self, task: int) -> dict[int, Fault | None]:
        """How the task ended on the other nodes, once it has."""
        found: dict[int, Fault | None] = {}
        while found.keys() != self._names.keys():
            for node in self._names.keys() - found.keys():
                text = value(self._store, f"ended/{task}/{node}")
                if text is not None:
                    found[node] = None if text == b"null" else Fault.from_text(text)
                elif self._beats.lost(node):
                    raise NodeError(
                        f"node {node} ({self._names[node]}) is gone: nothing was heard of it for {_LOST:.0f} s; what "
                        "is finished stays, and the next run goes on from there where the same nodes take it"
                    )
            time.sleep(POLL)
        return found

    def _raise(self, found: Mapping[int, Fault | None]) -> None:
        faults = {node: fault for node, fault in sorted(found.items()) if fault is not None}
        if faults:
            node = min(faults, key=lambda node: faults[node].rank)
            raise_fault(faults[node], f" on node {node} ({self._names[node]})" if node else "")

    def close(self) -> None:
        """Free the port, whoever still has this object."""
        del self._store

    def dismiss(self, why: str) -> None:
        """Tell the nodes that the step is over. `why`: where it failed."""
        self._store.set("over", why)
        deadline = time.monotonic() + _FAREWELL
        while time.monotonic() < deadline:
            if all(value(self._store, f"left/{node}") or self._beats.lost(node) for node in self._names):
                return
            time.sleep(POLL)


@dataclass(frozen=True, kw_only=True, slots=True)
class Helpers:
    """The other nodes, for one step.

    Attributes:
        model, key, head, base_fingerprint: of the step: by them a node finds in the stores what it reads.
        base, parent, new: where this node has the models: the base's, the parent's if any, and the one that comes out,
            which no store has yet.
    """

    gang: Gang
    model: str
    key: str
    head: int
    base_fingerprint: str
    base: Path
    parent: Path | None
    new: Path

    def run(self, request: Mapping[str, Any], processes: int, work: Work) -> None:
        """See `Gang.run`. `request`: of `flows.step.distributed`, with this node's paths."""
        told = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "gang"}
        plain = {name: str(value) if isinstance(value, Path) else value for name, value in told.items()}
        self.gang.run({**plain, "request": request}, processes, work)


@contextmanager
def open_gang(settings: Settings) -> Iterator[Gang]:
    """The nodes that take a step with this one, once all of them have come.

    Raises:
        NodeError: not all came in time, or one runs other code; all that came are told, and nothing was begun.
    """
    nodes, address = settings.model.nodes, settings.run.nodes_address
    if address is None:
        raise NodeError(
            f"model.nodes is {nodes}, and nobody said where the others find this one: set COPAL_NODES_ADDRESS or "
            "run.nodes_address to HOST:PORT, or COPAL_NODES=1 to take the step alone"
        )
    host, port = split_address(address)
    try:
        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=_ANSWER)
    except (DistError, RuntimeError) as error:
        raise NodeError(f"cannot listen on port {port} ({_first_line(error)}): name another one in {address}") from None
    store.set("gang", json.dumps({"nodes": nodes}))
    beats = Beats(TCPStore("127.0.0.1", port, is_master=False, timeout=_ANSWER), 0)
    names = dict[int, str]()
    gang, why = Gang(store, beats, host, names), ""
    try:
        _wait(store, beats, nodes, names, settings.run.nodes_wait)
        yield gang
    except BaseException as error:
        why = _first_line(error)
        raise
    finally:
        gang.dismiss(why)
        beats.close()
        gang.close()


def _wait(store: TCPStore, beats: Beats, nodes: int, names: dict[int, str], seconds: float) -> None:
    deadline, own = time.monotonic() + seconds, me()
    while len(names) < nodes - 1:
        for node in set(range(1, nodes)) - names.keys():
            if (text := value(store, f"come/{node}")) is None:
                continue
            who = json.loads(text)
            names[node] = str(who["machine"])
            beats.hear(node)
            if who["code"] != own["code"]:
                raise NodeError(
                    f"node {node} ({names[node]}) runs {who['code']}, and this one {own['code']}: give all the "
                    "same image"
                )
        if any(beats.lost(node) for node in names):
            raise NodeError(f"node {next(filter(beats.lost, names))} came and is gone again: nothing was begun")
        if time.monotonic() > deadline:
            raise NodeError(
                f"{len(names) + 1} of {nodes} nodes came within {seconds:.0f} s: run `copal node NUMBER` on each "
                "of the others, or lower model.nodes; nothing was begun"
            )
        time.sleep(POLL)


# --- of both sides


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT`."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def me() -> dict[str, str]:
    """This machine, and what runs here: nodes with other code would come to other bits, or to none."""
    code = code_version()
    own = f"copal {code['version']}" + (f" ({code['git_commit'][:8]})" if code["git_commit"] else "")
    return {"machine": socket.gethostname(), "code": f"{own} with torch {installed_version('torch')}"}


def connect(address: str, seconds: float) -> TCPStore:
    """The store of node 0, once it is there.

    Raises:
        NodeError: it did not come in time.
    """
    host, port = split_address(address)
    deadline = time.monotonic() + seconds
    while True:
        try:  # TCPStore would write a line for each try
            socket.create_connection((host, port), timeout=_LOST).close()
            return TCPStore(host, port, is_master=False, timeout=_ANSWER)
        except (OSError, DistError) as error:
            if time.monotonic() > deadline:
                raise NodeError(
                    f"node 0 was not at {address} within {seconds:.0f} s ({_first_line(error)}): it is the run of "
                    "`copal adapt` or of the flow, which must have this COPAL_NODES_ADDRESS"
                ) from None
        time.sleep(POLL)


def value(store: TCPStore, key: str) -> bytes | None:
    """What is under a key; None where nothing is, for which `get` would wait."""
    return store.get(key) if store.check([key]) else None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port
