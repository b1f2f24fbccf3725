"""Starts the processes of `copal up`, each in a process group of its own, and watches over them until all are ended."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from copal.files import write_atomic
from flows.isolated import isolated_environment, isolated_python
from flows.stack.access import access_file, client_environment, forget_access, new_access, write_access
from flows.stack.prefect_server import UpError
from flows.stack.state import Stack, end_processes, identify, state_file
from flows.uris import without_secrets
from flows.workspace import Workspace, make_private

__all__ = [
    "HOST",
    "Starting",
    "StopRequested",
    "stop_on_signals",
]


HOST = "127.0.0.1"


_START = 180.0  # seconds in which a server has to answer; a busy machine needs a minute


_PREFECT = {
    # Seconds: a watcher is woken for something, and what waits for a slot is looked at again.
    "PREFECT_WORKER_QUERY_SECONDS": "3",
    "PREFECT_SERVER_DEPLOYMENTS_CONCURRENCY_SLOT_WAIT_SECONDS": "5",
    # In memory, the slot of a run that a power cut ended would never come back.
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    "PREFECT_WORKER_ENABLE_CANCELLATION": "true",  # of runs that have no process yet, too
    "PREFECT_WORKER_CANCELLATION_POLL_SECONDS": "5",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
    "PREFECT_UI_API_URL": "/api",  # of the host that the browser was let in under
    "PREFECT_LOGGING_LEVEL": "INFO",
}


@dataclass(frozen=True, slots=True)
class Child:
    name: str
    process: subprocess.Popen[bytes]
    log: Path


class StopRequested(Exception):  # noqa: N818
    """Somebody wants an end while things still start."""


class Starting:
    """The children of a supervisor, and the credentials with which they talk.

    Its contract: after `end` none of them is left, nor the state file, nor the credentials.

    Args:
        model: name of the lineage, to whose page a browser is led.
        artifacts: where those of new lineages go; None where it is for the registry's server to say.
        own_registry: the MLflow server `registry` is one of the children.
    """

    def __init__(
        self,
        workspace: Workspace,
        model: str,
        api: str,
        registry: str,
        artifacts: str | None,
        ledger: str,
        *,
        own_registry: bool,
    ) -> None:
        self.workspace, self.api, self.registry = workspace, api, registry
        self.logs = make_private(workspace, workspace.private / "logs")
        self.home = make_private(workspace, workspace.private / "prefect")
        self.children: list[Child] = []
        self.access = new_access()
        write_access(workspace, self.access, model, api, registry if own_registry else None)
        stores = {"COPAL_REGISTRY_URI": registry, "COPAL_REGISTRY_ARTIFACTS": artifacts, "COPAL_LEDGER_URI": ledger}
        self.environment = _environment(self.home, api, stores)
        if own_registry:
            for name in ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_AUTH"):  # the user's, for another server
                self.environment.pop(name, None)
        self.environment |= client_environment(self.access, mlflow=own_registry)

    def save(self, *, ready: bool = False) -> None:
        """Write the state file."""
        children = tuple(identify(child.name, child.process.pid) for child in self.children)
        stack = Stack(
            supervisor=identify("copal up", os.getpid()),
            children=children,
            workspace=str(self.workspace.root),
            prefect=self.api,
            registry=without_secrets(self.registry),
            ready=ready,
        )
        write_atomic(state_file(self.workspace), json.dumps(asdict(stack), indent=2))

    def start(self, name: str, module: Sequence[str], sockets: Sequence[socket.socket] = (), **extra: str) -> Child:
        """Start `python -m MODULE ...` with a log of its own. It inherits the sockets."""
        log = self.logs / f"{name.replace(' ', '-')}.log"
        with log.open("ab") as sink:
            process = subprocess.Popen(
                isolated_python(*module),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                cwd=self.home,  # Prefect reads .env, prefect.toml and pyproject.toml where it runs: there are none
                env=self.environment | extra,
                pass_fds=[each.fileno() for each in sockets],
                start_new_session=True,  # Ctrl-C reaches the supervisor only; it ends the others in order
            )
        child = Child(name, process, log)
        self.children.append(child)
        self.save()
        return child

    def start_prefect(self, sockets: Sequence[socket.socket]) -> None:
        """Start the Prefect server on these sockets."""
        self._serve("prefect", sockets, PREFECT_SERVER_CORS_ALLOWED_ORIGINS=self.api.removesuffix("/api"))

    def start_mlflow(self, store: str, artifacts: str, sockets: Sequence[socket.socket]) -> None:
        """Start the MLflow server on these sockets, with its database and the place of artifacts."""
        self._serve(
            "mlflow",
            sockets,
            MLFLOW_BACKEND_STORE_URI=store,  # not among the arguments: everybody sees those, and it may hold a password
            MLFLOW_DEFAULT_ARTIFACT_ROOT=artifacts,
            MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",  # eight more processes for what copal does not use
        )

    def _serve(self, name: str, sockets: Sequence[socket.socket], **extra: str) -> None:
        numbers = [str(each.fileno()) for each in sockets]
        module = ("flows.stack.serve", name, str(access_file(self.workspace)), *numbers)
        self.start(f"{name} server", module, sockets, **extra)

    def deploy(self, file: Path, stop: threading.Event) -> None:
        """`prefect deploy --all`."""
        module = ("prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(file))
        child = self.start("prefect deploy", module)
        self.wait(lambda: child.process.poll() is not None, stop, "the deployments", but=child)
        self.children.remove(child)
        if child.process.returncode != 0:
            raise UpError(f"the deployments of {file} were refused: see {child.log}")
        self.save()

    def wait(self, there: Callable[[], bool], stop: threading.Event, what: str, *, but: Child | None = None) -> None:
        """Wait until `there()`, while the children but `but` live and nobody wants to stop."""
        deadline = time.monotonic() + _START
        while not there():
            self._check(but)
            if time.monotonic() > deadline:
                raise UpError(f"waited {_START:.0f} s for {what}: see the logs in {self.logs}")
            if stop.wait(0.2):
                raise StopRequested

    def watch_over(self, stop: threading.Event) -> None:
        """Until `stop`.

        Raises:
            UpError: a child ended.
        """
        while not stop.wait(0.5):
            self._check(None)

    def _check(self, but: Child | None) -> None:
        for child in self.children:
            if child is not but and child.process.poll() is not None:
                raise UpError(
                    f"{child.name} ended by itself (exit status {child.process.returncode}), and so all of it was "
                    f"ended: see {child.log}"
                )

    def end(self) -> None:
        """End all children: the workers first, so that they and their flows can still tell the server."""
        workers = [child for child in self.children if child.name.startswith("worker")]
        servers = [child for child in self.children if not child.name.startswith("worker")]
        for children in (workers, servers):
            end_processes([child.process.pid for child in children])
            for child in children:
                child.process.wait()
        forget_access(self.workspace)
        state_file(self.workspace).unlink(missing_ok=True)


@contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C, SIGTERM and a closed terminal set; a second signal does not cut the end short."""
    stop = threading.Event()
    names = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
        names.append(signal.SIGHUP)
    before = [signal.signal(name, lambda *_: stop.set()) for name in names]
    try:
        yield stop
    finally:
        for name, handler in zip(names, before, strict=True):
            signal.signal(name, handler)


def _environment(home: Path, api: str, stores: Mapping[str, str | None]) -> dict[str, str]:
    """Of the children: the user's, but for what would bring Prefect to another server or profile."""
    found = {name: value for name, value in isolated_environment().items() if not name.startswith("PREFECT_")}
    found.pop("MLFLOW_TRACKING_URI", None)
    for name in ("NO_PROXY", "no_proxy"):  # a proxy of the user's is not for what runs on this machine
        found[name] = ",".join(filter(None, (found.get(name), HOST, "localhost")))
    found |= {name: uri for name, uri in stores.items() if uri is not None}
    return found | _PREFECT | {"PREFECT_HOME": str(home), "PREFECT_API_URL": api}
