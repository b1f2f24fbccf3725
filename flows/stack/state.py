"""The file `.copal/up.json`, which says what `copal up` started; and how such processes are ended."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from flows.machine import find_process
from flows.workspace import Workspace

__all__ = [
    "END_SECONDS",
    "Stack",
    "end_known",
    "end_processes",
    "identify",
    "is_up",
    "read_stack",
    "state_file",
]


END_SECONDS = 25.0  # seconds that a process has to end by itself after it was asked


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """A process, told from a later one with the same number by when it started."""

    name: str
    pid: int
    started: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """What `copal up` runs.

    Attributes:
        supervisor: the process that watches over the others.
        children: what it has started so far.
        workspace: its folder when it was started.
        prefect: URL of the Prefect API.
        registry: MLflow tracking URI of the flows, without a password.
        ready: whether all of it is up.
    """

    supervisor: Process
    children: tuple[Process, ...]
    workspace: str
    prefect: str
    registry: str
    ready: bool


def read_stack(workspace: Workspace) -> Stack | None:
    """What runs in the workspace, or ran when its supervisor was killed; None where nothing was left behind.

    What runs in the workspace that this one was copied from is not its own.
    """
    try:
        found = json.loads(state_file(workspace).read_text(encoding="utf-8"))
        stack = Stack(
            supervisor=Process(**found.pop("supervisor")),
            children=tuple(Process(**child) for child in found.pop("children")),
            **found,
        )
        is_copy = Path(stack.workspace) != workspace.root and state_file(Workspace(Path(stack.workspace))).exists()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError, KeyError, AttributeError):  # not ours, or of another release
        return None
    return None if is_copy else stack


def is_up(workspace: Workspace) -> Stack | None:
    """What runs in the workspace; None where its supervisor does not live."""
    stack = read_stack(workspace)
    return (
        stack
        if stack is not None and find_process(stack.supervisor.pid, stack.supervisor.started) is not None
        else None
    )


def state_file(workspace: Workspace) -> Path:
    return workspace.private / "up.json"


def identify(name: str, pid: int) -> Process:
    import psutil

    try:
        return Process(name=name, pid=pid, started=psutil.Process(pid).create_time())
    except psutil.NoSuchProcess:  # it ended at once; whoever waits for it says so
        return Process(name=name, pid=pid, started=0.0)


def lives(process: Process) -> bool:
    return find_process(process.pid, process.started) is not None


def end_known(processes: Sequence[Process], *, limit: float) -> bool:
    alive = [process.pid for process in processes if lives(process)]
    end_processes(alive, limit)
    return bool(alive)


def end_processes(pids: Sequence[int], limit: float = END_SECONDS) -> None:
    """Ask processes to end, and kill them and all that they started and left if they do not within `limit` seconds."""
    import psutil

    asked = []
    family: dict[int, psutil.Process] = {}
    for pid in pids:
        try:
            leader = psutil.Process(pid)
            family |= {child.pid: child for child in (leader, *leader.children(recursive=True))}
            leader.terminate()
            asked.append(leader)
        except psutil.NoSuchProcess:
            continue
    deadline = time.monotonic() + limit
    while asked and time.monotonic() < deadline:
        for leader in asked:  # a worker may have started another run just before it was asked
            with suppress(psutil.NoSuchProcess):
                family |= {child.pid: child for child in leader.children(recursive=True)}
        _, asked = psutil.wait_procs(asked, timeout=0.5)
    _, rest = psutil.wait_procs(list(family.values()), timeout=0)
    for process in rest:  # what a leader leaves behind has nobody to end it any more
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(rest, timeout=END_SECONDS)
