"""The processes of one task on this machine: torch's own launcher, through accelerate, starts them; what ended them.

Each runs `flows.step.distributed` in a folder with what it has to know. The main one tells its progress in lines on
standard output. One that cannot go on writes error-PID.json; the launcher then ends the others.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from copal import errors
from copal.errors import CopalError, ResourceError, SettingsError, SmallerBatchWarning
from copal.files import write_atomic
from copal.printable import printable_lines
from copal.progress import Progress
from flows.isolated import isolated_environment, isolated_python

__all__ = ["Fault", "Place", "check_devices", "leave", "raise_fault", "run_alone", "run_processes", "tell"]

# In place of the user's own configuration, which may be for another machine or purpose. MULTI_GPU means several
# processes, on a CPU as well.
_ACCELERATE = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "MULTI_GPU",
    "mixed_precision": "no",
    "use_cpu": False,
    "debug": False,
}
_KILLED = re.compile(r"exitcode\s*: -9\b")
_LOG = 20_000  # characters of it that are told
_LOOK = 0.3  # seconds between two looks at whether the processes are to end
_TASK = "flows.step.distributed"
_KILLED_KIND, _BUG = "killed", "bug"


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where this machine's processes stand among all that work on a task.

    Attributes:
        processes: on each node.
        nodes: machines.
        node: this one; 0 is the one with the main process.
        host, port: where that one's launcher is found by the others'.
    """

    processes: int
    nodes: int = 1
    node: int = 0
    host: str = "127.0.0.1"
    port: int = 0  # any that is free: for one node


@dataclass(frozen=True, slots=True)
class Fault:
    """Why processes ended.

    Attributes:
        kind: a class of `copal.errors`, `OSError`, `killed` (by the system), or `bug`.
        arguments: of the error.
    """

    kind: str
    arguments: tuple[Any, ...] = ()

    @property
    def rank(self) -> int:
        """Of several faults at once the lowest is the cause, and the others most likely follow from it."""
        return {_KILLED_KIND: 1, _BUG: 3}.get(self.kind, 0)

    def as_text(self) -> str:
        """What `from_text` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str | bytes) -> Fault:
        values = json.loads(text)
        return cls(values["kind"], tuple(values["arguments"]))


def run_processes(
    folder: Path, place: Place, progress: Progress, over: Callable[[], bool] | None = None
) -> Fault | None:
    """Run the task in `folder` in this machine's processes, until they end.

    Args:
        over: asked now and then whether they are to end, since the others do.

    Returns:
        Why they ended; None where they have done their work.
    """
    write_atomic(folder / "accelerate.json", json.dumps(_ACCELERATE))
    threads = max(1, torch.get_num_threads() // place.processes)
    command = [
        *isolated_python("accelerate.commands.launch", "--config_file", str(folder / "accelerate.json")),
        *("--num_machines", str(place.nodes), "--machine_rank", str(place.node)),
        *("--num_processes", str(place.nodes * place.processes)),
        *("--main_process_ip", place.host, "--main_process_port", str(place.port)),
        *(("--rdzv_backend", "static") if place.nodes > 1 else ()),
        *("--num_cpu_threads_per_process", str(threads), "-m", _TASK, str(folder)),
    ]
    return _run(folder, command, isolated_environment(), progress, over)


def run_alone(module: str, folder: Path, progress: Progress, environment: Mapping[str, str]) -> Fault | None:
    """Run `python -m module folder` until it ends, with these variables in its environment; see `run_processes`."""
    command = isolated_python(module, str(folder))
    return _run(folder, command, isolated_environment() | dict(environment), progress, None)


def _run(
    folder: Path,
    command: Sequence[str],
    environment: Mapping[str, str],
    progress: Progress,
    over: Callable[[], bool] | None,
) -> Fault | None:
    log = folder / "log"
    with (
        log.open("w") as stderr,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment) as launcher,
    ):
        try:
            assert launcher.stdout is not None
            with _ended_when(over, launcher):
                _listen(launcher.stdout, progress)
        except BaseException:
            launcher.terminate()  # it ends the processes
            raise
    if launcher.returncode == -signal.SIGKILL:
        return Fault(_KILLED_KIND)
    return None if launcher.returncode == 0 else _fault(sorted(folder.glob("error-*.json")), log.read_text())


@contextmanager
def _ended_when(over: Callable[[], bool] | None, launcher: subprocess.Popen[str]) -> Iterator[None]:
    """While this waits for lines, which may never come, another thread looks."""
    if over is None:
        yield
        return
    done = threading.Event()

    def look() -> None:
        while not done.wait(_LOOK):
            if over():
                launcher.terminate()
                return

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _listen(lines: Iterable[str], progress: Progress) -> None:
    for line in lines:
        kind, _, value = line.partition(" ")
        if kind == "progress":
            progress(*json.loads(value))
        elif kind == "warning":
            warnings.warn(json.loads(value), SmallerBatchWarning, stacklevel=2)
        else:  # a library's
            print(printable_lines(line), end="", file=sys.stderr)


def _fault(files: Sequence[Path], log: str) -> Fault:
    if files:
        return Fault.from_text(files[0].read_text())
    return Fault(_KILLED_KIND) if _KILLED.search(log) else Fault(_BUG, (log[-_LOG:],))


def raise_fault(fault: Fault, where: str = "") -> None:
    """Raise the error that ended processes, as what it was there.

    Args:
        where: ` on node 1 (its name)`, for a process of another machine.
    """
    kind, arguments = fault.kind, fault.arguments
    if kind == "OSError":
        number, text, *file = arguments
        raise OSError(number, f"{text}{where}", *file)
    if kind == _KILLED_KIND:
        raise ResourceError(
            f"the system killed a process of the step{where}, most likely for want of memory: lower model.processes"
        )
    if kind == _BUG:
        raise RuntimeError(f"a process of the step failed{where}:\n{arguments[0]}")
    message, *_ = arguments
    raise getattr(errors, kind, CopalError)(f"{where.removeprefix(' ')}: {message}" if where else message)


def check_devices(processes: int) -> None:
    """Each process has a GPU of its own, where there are any.

    Raises:
        SettingsError: this machine has fewer.
    """
    if torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise SettingsError(f"model.processes is {processes}, but this machine has {torch.cuda.device_count()} GPUs")


# --- in each process


def tell(kind: str, value: Any) -> None:
    """Tell whoever started the processes: of `progress` or a `warning`."""
    print(kind, json.dumps(value), flush=True)


def leave(folder: Path, fault: Fault) -> None:
    """Say in the task's folder why this process cannot go on."""
    write_atomic(folder / f"error-{os.getpid()}.json", fault.as_text())
