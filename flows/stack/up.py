"""`copal up`: what a team's workspace needs, on this machine's loopback, until it is stopped.

A Prefect server, an MLflow server, the deployments of infra/prefect.yaml and a worker for each of their work pools.
Each is a child process in a process group of its own, watched over by the process that runs `up`. What they keep lies
in `.copal/`; of the user's own Prefect settings nothing is read or changed. Other users of the machine are not let in
(`flows.stack.access`), nor are the pages that a browser shows (`flows.stack.guard`).
"""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from copal.files import write_atomic
from flows.isolated import isolated_environment, isolated_python
from flows.registry.sqlite import open_database
from flows.settings import Settings
from flows.stack.access import RUNS_PAGE, forget_access, link_file, model_page
from flows.stack.deployments import deployment_names, prefect_file, render_prefect_file
from flows.stack.prefect_server import POOLS, UpError, answers, create_pools, has_worker, settle_old_runs
from flows.stack.state import END_SECONDS, end_known, is_up, read_stack, state_file
from flows.stack.supervisor import HOST, Starting, StopRequested, stop_on_signals
from flows.uris import is_server
from flows.workspace import Workspace, make_private

__all__ = [
    "down",
    "up",
    "up_detached",
]

_OURS = "copal: "  # how the line of an error begins: see `flows.cli.output.refuse`


def up(
    workspace: Workspace,
    settings: Settings,
    *,
    port: int,
    mlflow_port: int,
    devices: str | None,
    tell: Callable[[str], None],
    working: Callable[[str], AbstractContextManager[object]],
) -> None:
    """Start servers, deployments and workers, and keep them until SIGINT, SIGTERM or SIGHUP; then end them all.

    Args:
        port: of the Prefect server.
        mlflow_port: of the MLflow server; none is started where the settings name an http(s) registry.
        devices: the CUDA devices that a step may see; None: those that this process sees.
        tell: is called with each line that the user should see.
        working: what to be in while something starts, of which it shows that it goes on.

    Raises:
        UpError: it is up already, a port is taken, or something does not start or ended by itself. Nothing is left.
        RegistryError: the registry in the workspace cannot be opened.
    """
    own_registry = not is_server(settings.registry.uri)
    _refuse_if_up(workspace)
    _end_leftovers(workspace)
    with ExitStack() as ports, stop_on_signals() as stop:
        sockets = ports.enter_context(_taken(port, "--port"))
        mlflow_sockets = ports.enter_context(_taken(mlflow_port, "--mlflow-port")) if own_registry else []
        template = prefect_file()
        registry = f"http://{HOST}:{mlflow_port}" if own_registry else str(settings.registry.uri)
        api, ledger = f"http://{HOST}:{port}/api", workspace.ledger_uri(settings)
        artifacts = workspace.artifact_location(settings)
        stack = Starting(workspace, settings.model.name, api, registry, artifacts, ledger, own_registry=own_registry)
        try:
            stack.save()
            _start_servers(stack, sockets, mlflow_sockets, settings, stop, tell, working)
            auth = stack.access.auth_string
            create_pools(stack.api, auth)
            settle_old_runs(stack.api, auth, str(workspace.root))
            shown = registry if is_server(registry) else None
            text = render_prefect_file(template, workspace, settings, registry=shown, devices=devices)
            _deploy(stack, text, stop, tell, working)
            _start_workers(stack, stop, tell, working)
            tell(f"Prefect: http://{HOST}:{port}{RUNS_PAGE}")
            tell(f"MLflow: {registry.rstrip('/')}{model_page(settings.model.name)}")
            tell(f"a browser is let in by the links in {link_file(workspace).as_uri()}")
            tell(f"`copal down` in {workspace.root} ends all of it")
            stack.save(ready=True)  # last: whoever waits for it shows what was told
            stack.watch_over(stop)
        except StopRequested:
            pass
        finally:
            stack.end()


def _start_servers(
    stack: Starting,
    sockets: Sequence[socket.socket],
    mlflow_sockets: Sequence[socket.socket],
    settings: Settings,
    stop: threading.Event,
    tell: Callable[[str], None],
    working: Callable[[str], AbstractContextManager[object]],
) -> None:
    """Start the Prefect server, and an MLflow server where there are sockets for it; wait until they answer."""
    port = urlsplit(stack.api).port
    with working("starting the servers"):
        stack.start_prefect(sockets)
        if mlflow_sockets:
            store = stack.workspace.registry_uri(settings)
            # A workspace that was copied is settled before others see it.
            open_database(store, stack.workspace.artifact_root(settings))
            stack.start_mlflow(store, str(stack.workspace.artifact_location(settings)), mlflow_sockets)
        stack.wait(lambda: answers(f"{stack.api}/health"), stop, f"the Prefect server to answer on port {port}")
    tell(f"Prefect server: port {port}")
    if mlflow_sockets:
        with working("starting the MLflow server"):
            stack.wait(lambda: answers(f"{stack.registry}/health"), stop, "the MLflow server to answer")
        tell(f"MLflow server: port {urlsplit(stack.registry).port}")


def _deploy(
    stack: Starting,
    text: str,
    stop: threading.Event,
    tell: Callable[[str], None],
    working: Callable[[str], AbstractContextManager[object]],
) -> None:
    """Deploy what the deployments' file `text` says."""
    rendered = stack.workspace.private / "prefect.yaml"
    write_atomic(rendered, text)
    with working("deploying the flows"):
        stack.deploy(rendered, stop)
    tell(f"deployments: {', '.join(deployment_names(text))}")


def _start_workers(
    stack: Starting,
    stop: threading.Event,
    tell: Callable[[str], None],
    working: Callable[[str], AbstractContextManager[object]],
) -> None:
    """Start a worker for each pool, in turn: at once, their first words to the server lock its SQLite file for each
    other.
    """
    for pool in POOLS:
        with working(f"starting the worker of pool {pool}"):
            stack.start(f"worker {pool}", ("prefect", "worker", "start", "--pool", pool, "--type", "process"))
            there = partial(has_worker, stack.api, stack.access.auth_string, pool)
            stack.wait(there, stop, f"the worker of pool {pool}")
        tell(f"worker: pool {pool}")


def up_detached(workspace: Workspace, arguments: Sequence[str], tell: Callable[[str], None]) -> None:
    """Run `copal up ARGUMENTS` in the background; returns when all is up.

    Raises:
        UpError: it did not come up; says why.
    """
    _refuse_if_up(workspace)
    log = make_private(workspace, workspace.private / "logs") / "up.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            isolated_python("flows.cli", "up", "--workspace", str(workspace.root), *arguments),
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=isolated_environment(),
            start_new_session=True,
        )
    told = 0
    try:
        while not _is_ready(workspace, process.pid):
            told = _pass_on(log, told, tell)
            try:
                process.wait(0.2)
            except subprocess.TimeoutExpired:
                continue
            said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it said nothing"]
            raise UpError(said[-1].removeprefix(_OURS))
    except BaseException:
        process.terminate()
        process.wait()
        raise
    _pass_on(log, told, tell)


def _pass_on(log: Path, told: int, tell: Callable[[str], None]) -> int:
    """Tell the whole lines of `log` after the first `told` of them, but for an error; gives how many there are."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    whole = [line.rstrip() for line in lines if line.endswith("\n")]
    for line in whole[told:]:
        if not line.startswith(_OURS):
            tell(line)
    return len(whole)


def down(workspace: Workspace) -> bool:
    """End what `copal up` runs in this workspace, and wait for the end.

    Returns:
        Whether anything ran.
    """
    stack = read_stack(workspace)
    if stack is None:
        return False
    ran = end_known([stack.supervisor], limit=4 * END_SECONDS)  # it ends its children, in turn
    return _end_leftovers(workspace) or ran


def _refuse_if_up(workspace: Workspace) -> None:
    stack = is_up(workspace)
    if stack is not None and stack.supervisor.pid != os.getpid():
        raise UpError(
            f"copal is up in {workspace.root} already (process {stack.supervisor.pid}, Prefect at {stack.prefect}): "
            "run `copal down` first"
        )


def _is_ready(workspace: Workspace, pid: int) -> bool:
    stack = read_stack(workspace)
    return stack is not None and stack.ready and stack.supervisor.pid == pid


def _end_leftovers(workspace: Workspace) -> bool:
    """End what a killed supervisor left, and remove its state file; whether there was anything that ran."""
    stack = read_stack(workspace)
    ran = end_known(stack.children, limit=END_SECONDS) if stack is not None else False
    forget_access(workspace)
    state_file(workspace).unlink(missing_ok=True)
    return ran


@contextmanager
def _taken(port: int, option: str) -> Iterator[list[socket.socket]]:
    """The port of this machine's loopback, IPv4 and (where there is one) IPv6, held until all is ended.

    The servers inherit it. Did they bind it themselves, another user could be there first, and would be told the
    credentials and asked for work; under `localhost` a browser looks at IPv6 as well.
    """
    with ExitStack() as held:
        sockets = []
        for family, address in ((socket.AF_INET, HOST), (socket.AF_INET6, "::1")):
            try:
                found = held.enter_context(socket.socket(family))
                found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what closed a second ago is not in use
                if family is socket.AF_INET6:
                    found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                found.bind((address, port))
            except OSError as error:
                if family is socket.AF_INET6 and error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    continue
                raise UpError(f"port {port} is in use ({error.strerror}): choose another one with {option}") from error
            sockets.append(found)
        yield sockets
