"""One of the other nodes of a step, `copal node NUMBER`: it computes with node 0 (`flows.step.gang`) until that ends.

It shares nothing with node 0 but the stores. Base, parent and states it brings out of the registry into its own cache,
as a step does; what node 0 alone has (windows, and the new version when it is evaluated) the processes send each other.

What its processes have finished lies in a folder of its own (`flows.step.staging`). It stays where the step fails.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]  # it is documented there

from copal.errors import CopalError
from copal.files import locked_if_free, write_atomic
from copal.printable import printable_lines
from copal.progress import silent
from flows.project import Project
from flows.step.distributed import REQUEST_FILE
from flows.step.gang import POLL, Beats, NodeError, connect, me, value
from flows.step.launch import Fault, Place, check_devices, run_processes
from flows.step.resolve import Inputs, inputs_of, run_folder
from flows.step.staging import STEP_FILE, TASK, node_lock
from flows.workspace import make_private

__all__ = ["localized", "serve"]


@dataclass(frozen=True, slots=True)
class _Node:
    """This node, in the gang."""

    number: int
    address: str
    store: TCPStore
    beats: Beats

    def wait(self, *keys: str) -> dict[str, bytes]:
        """Those of the keys that are there, once one of them is."""
        while not (found := {key: text for key in keys if (text := self.value(key)) is not None}):
            time.sleep(POLL)
        return found

    def value(self, key: str) -> bytes | None:
        """See `flows.step.gang.value`.

        Raises:
            NodeError: node 0 is gone.
        """
        try:
            if not self.beats.lost(0):
                return value(self.store, key)
        except DistError:
            pass
        raise NodeError(
            f"node 0 at {self.address} is gone: what is finished stays here; start this again, and the step there"
        )


def serve(project: Project, number: int, address: str, wait: float, tell: Callable[[str], None]) -> None:
    """Be node `number` of the step that node 0 takes at `address`, until that is over; no other process is it here.

    Args:
        wait: seconds in which node 0 must be there.
        tell: called with a line on what happens.

    Raises:
        NodeError: another process is this node here; node 0 is not there, has no room for this node, is gone, or its
            step failed.
        CopalError: what the step reads cannot be had here; node 0 hears of it.
    """
    make_private(project.workspace, project.workspace.nodes)
    with locked_if_free(node_lock(project.workspace, number)) as free:
        if not free:
            raise NodeError(
                f"another process is node {number} in {project.workspace.root}: give this one another number, or a "
                "workspace of its own"
            )
        _join(project, number, address, wait, tell)


def _join(project: Project, number: int, address: str, wait: float, tell: Callable[[str], None]) -> None:
    store = connect(address, wait)
    nodes = json.loads(store.get("gang"))["nodes"]
    if not 0 < number < nodes:
        raise NodeError(f"node {number} is none of those at {address}: with model.nodes {nodes} they go to {nodes - 1}")
    own = json.dumps(me() | {"token": uuid4().hex})
    if store.compare_set(f"come/{number}", "", own).decode() != own:
        raise NodeError(f"another machine is node {number} at {address} already: give each a number of its own")
    beats = Beats(connect(address, wait), number)
    beats.hear(0)
    try:
        tell(f"node {number} of {nodes}: waits for node 0 at {address}")
        _serve(project, _Node(number, address, store, beats), tell)
    finally:
        beats.close()


def _serve(project: Project, node: _Node, tell: Callable[[str], None]) -> None:
    task = 0
    while "over" not in (found := node.wait("over", f"task/{task}")):
        told = json.loads(found[f"task/{task}"])
        tell(f"node {node.number}: {told['request']['task']}")
        fault = _task(project, node, task, told)
        node.store.set(f"ended/{task}/{node.number}", fault.as_text() if fault else "null")
        task += 1
    node.store.set(f"left/{node.number}", "1")
    if why := found["over"].decode():
        raise NodeError(f"node 0 ended the step: {why}")
    if task:
        shutil.rmtree(_own(project, node.number), ignore_errors=True)


def _task(project: Project, node: _Node, task: int, told: Mapping[str, Any]) -> Fault | None:
    """What ended this node's processes; None where they have done their work."""
    try:
        check_devices(told["processes"])
        folder = _folder(project, node.number, told)
        request = localized(told, _inputs(project, told), folder)
        (folder / TASK).mkdir()
        write_atomic(folder / TASK / REQUEST_FILE, json.dumps(request, default=str))
    except CopalError as error:
        return Fault(type(error).__name__, (str(error),))
    except OSError as error:
        return Fault("OSError", (error.errno, error.strerror, error.filename))
    node.store.set(f"ready/{task}/{node.number}", "1")
    found = node.wait(f"start/{task}", f"stop/{task}", "over")
    if f"start/{task}" not in found:
        return None
    place = Place(
        processes=told["processes"],
        nodes=told["nodes"],
        node=node.number,
        host=told["host"],
        port=int(found[f"start/{task}"]),
    )
    try:
        return run_processes(folder / TASK, place, silent, over=partial(_over, node, task))
    finally:
        shutil.rmtree(folder / TASK, ignore_errors=True)


def _over(node: _Node, task: int) -> bool:
    try:
        return node.value(f"stop/{task}") is not None or node.value("over") is not None
    except NodeError as error:
        print(printable_lines(f"copal: {error}"), file=sys.stderr)
        return True


def _folder(project: Project, number: int, told: Mapping[str, Any]) -> Path:
    """This node's folder for the step; of other steps, which will not go on, nothing stays."""
    if told["model"] != project.name or not str(told["key"]).isalnum():
        raise NodeError(f"this workspace grows {project.name}, and node 0 {told['model']}: give all the same workspace")
    mine = make_private(project.workspace, _own(project, number))
    folder = mine / run_folder(project, told["key"]).name
    for path in mine.iterdir():
        if path != folder:
            shutil.rmtree(path)
    shutil.rmtree(folder / TASK, ignore_errors=True)
    folder.mkdir(exist_ok=True)
    write_atomic(folder / STEP_FILE, json.dumps({"model": told["model"], "head": told["head"]}))
    return folder


def _own(project: Project, number: int) -> Path:
    return project.workspace.nodes / str(number)


def _inputs(project: Project, told: Mapping[str, Any]) -> Inputs:
    """What the step reads, in this machine's cache."""
    project.registry.refresh()
    found = inputs_of(project.registry, project.registry.kept(told["head"]))
    if found.base_fingerprint != told["base_fingerprint"]:
        raise NodeError(f"the base of {project.name} is another one here than on node 0: give all the same registry")
    return found


def localized(told: Mapping[str, Any], inputs: Inputs, folder: Path) -> dict[str, Any]:
    """The request of a task (`flows.step.distributed`) with this machine's paths in place of node 0's.

    Args:
        told: `request`, and where node 0 has the `base`, the `parent`'s model and the `new` one.
        folder: this machine's, for the step.
    """
    request: dict[str, Any] = dict(told["request"])
    parent = inputs.parent
    if request["task"] == "prune":
        if request["parent"] is not None:
            assert parent is not None
            request["parent"] |= {"model": parent / "model", "state": parent / "state", "states": dict(inputs.states)}
        request["base"] |= {"folder": inputs.base}
        return request | {"out": folder / "version", "resume": folder / "unfinished"}
    new = folder / TASK / "new"
    places: dict[str | None, Path] = {told["new"]: new, told["base"]: inputs.base}
    if parent is not None:
        places[told["parent"]] = parent / "model"
    return request | {"new": new, "jobs": [[places[checkpoint], domains] for checkpoint, domains in request["jobs"]]}
