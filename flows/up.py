"""`copal up`: what a team's workspace needs, on this machine's loopback, until it is stopped.

A Prefect server, an MLflow server, the deployments of infra/prefect.yaml and a worker for each of their work pools.
Each is a child process in a process group of its own, watched over by the process that runs `up`. What they keep lies
in `.copal/`; of the user's own Prefect settings nothing is read or changed.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sysconfig
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from copal.errors import CopalError
from copal.files import write_atomic
from flows.alive import find_process
from flows.isolated import isolated_environment, isolated_python
from flows.settings import Settings, Workspace

__all__ = ["Stack", "UpError", "down", "prefect_file", "read_stack", "render_prefect_file", "up", "up_detached"]

_GPU_POOL = "copal-gpu"
POOLS = ("copal-cpu", _GPU_POOL)

_HOST = "127.0.0.1"
_START = 180.0  # seconds in which a server has to answer; a busy machine needs a minute
_END = 25.0  # seconds that a process has to end by itself after it was asked
_TRIES = 10  # a second apart
_PREFECT = {
    # Seconds: a watcher is woken for something, and what waits for a slot is looked at again.
    "PREFECT_WORKER_QUERY_SECONDS": "3",
    "PREFECT_SERVER_DEPLOYMENTS_CONCURRENCY_SLOT_WAIT_SECONDS": "5",
    # In memory, the slot of a run that a power cut ended would never come back.
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    "PREFECT_WORKER_ENABLE_CANCELLATION": "true",  # of runs that have no process yet, too
    "PREFECT_WORKER_CANCELLATION_POLL_SECONDS": "5",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_LEVEL": "INFO",
}


class UpError(CopalError):
    """The servers and workers of a workspace cannot start, or one of them ended."""


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
        prefect: URL of the Prefect API.
        registry: MLflow tracking URI of the flows.
        ready: whether all of it is up.
    """

    supervisor: Process
    children: tuple[Process, ...]
    prefect: str
    registry: str
    ready: bool


@dataclass(frozen=True, slots=True)
class _Child:
    name: str
    process: subprocess.Popen[bytes]
    log: Path


class _StopRequested(Exception):  # noqa: N818
    """Somebody wants an end while things still start."""


# --- up


def up(
    workspace: Workspace,
    settings: Settings,
    *,
    port: int,
    mlflow_port: int,
    devices: str | None,
    tell: Callable[[str], None],
) -> None:
    """Start servers, deployments and workers, and keep them until SIGINT, SIGTERM or SIGHUP; then end them all.

    Args:
        port: of the Prefect server.
        mlflow_port: of the MLflow server; none is started where the settings name an http(s) registry.
        devices: the CUDA devices that a step may see; None: those that this process sees.
        tell: is called with each line that the user should see.

    Raises:
        UpError: it is up already, a port is taken, or something does not start or ended by itself. Nothing is left.
    """
    own_registry = not _is_server(settings.registry.uri)
    _refuse_if_up(workspace)
    _end_leftovers(workspace)
    _check_port(port, "--port")
    if own_registry:
        _check_port(mlflow_port, "--mlflow-port")
    template = prefect_file()
    api = f"http://{_HOST}:{port}/api"
    registry = f"http://{_HOST}:{mlflow_port}" if own_registry else str(settings.registry.uri)
    stack = _Starting(workspace, api, registry)
    with _stop_on_signals() as stop:
        try:
            stack.save()
            stack.start("prefect server", ("prefect", "server", "start", "--host", _HOST, "--port", str(port)))
            if own_registry:
                stack.start_mlflow(workspace.registry_uri(settings), mlflow_port)
            stack.wait(lambda: _answers(f"{api}/health"), stop, f"the Prefect server to answer on port {port}")
            tell(f"Prefect server: port {port}")
            if own_registry:
                stack.wait(lambda: _answers(f"{registry}/health"), stop, "the MLflow server to answer")
                tell(f"MLflow server: port {mlflow_port}")
            _create_pools(api)
            _settle_old_runs(api)
            rendered = workspace.private / "prefect.yaml"
            shown = None if not _is_server(registry) else registry
            write_atomic(rendered, render_prefect_file(template, workspace, settings, registry=shown, devices=devices))
            stack.deploy(rendered, stop)
            tell("deployments: watch, adapt, promote, rollback, audit")
            for pool in POOLS:  # in turn: at once, their first words to the server lock its SQLite file for each other
                stack.start(f"worker {pool}", ("prefect", "worker", "start", "--pool", pool, "--type", "process"))
                stack.wait(partial(_has_worker, api, pool), stop, f"the worker of pool {pool}")
                tell(f"worker: pool {pool}")
            stack.save(ready=True)
            tell(f"Prefect: http://{_HOST}:{port}")
            tell(f"MLflow: {registry}")
            tell(f"`copal down` in {workspace.root} ends all of it")
            stack.watch_over(stop)
        except _StopRequested:
            pass
        finally:
            stack.end()


class _Starting:
    """The children of a supervisor. Its contract: after `end` none of them is left, nor the state file."""

    def __init__(self, workspace: Workspace, api: str, registry: str) -> None:
        self.workspace, self.api, self.registry = workspace, api, registry
        self.logs = workspace.private / "logs"
        self.home = workspace.private / "prefect"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.home.mkdir(exist_ok=True)
        self.children: list[_Child] = []
        self.environment = _environment(self.home, api, registry)

    def save(self, *, ready: bool = False) -> None:
        """Write the state file."""
        children = tuple(_identify(child.name, child.process.pid) for child in self.children)
        stack = Stack(
            supervisor=_identify("copal up", os.getpid()),
            children=children,
            prefect=self.api,
            registry=self.registry,
            ready=ready,
        )
        write_atomic(_state_file(self.workspace), json.dumps(asdict(stack), indent=2))

    def start(self, name: str, module: Sequence[str], **extra: str) -> _Child:
        """Start `python -m MODULE ...` with a log of its own."""
        log = self.logs / f"{name.replace(' ', '-')}.log"
        with log.open("ab") as sink:
            process = subprocess.Popen(
                isolated_python(*module),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                cwd=self.home,  # Prefect reads .env, prefect.toml and pyproject.toml where it runs: there are none
                env=self.environment | extra,
                start_new_session=True,  # Ctrl-C reaches the supervisor only; it ends the others in order
            )
        child = _Child(name, process, log)
        self.children.append(child)
        self.save()
        return child

    def start_mlflow(self, store: str, port: int) -> None:
        """Start the MLflow server. Artifacts do not go through it: clients write them where the experiment says."""
        arguments = ("--host", _HOST, "--port", str(port), "--workers", "1", "--no-serve-artifacts")
        root = self.workspace.artifacts.as_uri()
        self.start(
            "mlflow server",
            ("mlflow", "server", *arguments, "--default-artifact-root", root),
            MLFLOW_BACKEND_STORE_URI=store,  # not among the arguments: everybody sees those, and it may hold a password
            MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",  # eight more processes for what copal does not use
        )

    def deploy(self, file: Path, stop: threading.Event) -> None:
        """`prefect deploy --all`."""
        module = ("prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(file))
        child = self.start("prefect deploy", module)
        self.wait(lambda: child.process.poll() is not None, stop, "the deployments", but=child)
        self.children.remove(child)
        if child.process.returncode != 0:
            raise UpError(f"the deployments of {file} were refused: see {child.log}")
        self.save()

    def wait(self, there: Callable[[], bool], stop: threading.Event, what: str, *, but: _Child | None = None) -> None:
        """Wait until `there()`, while the children but `but` live and nobody wants to stop."""
        deadline = time.monotonic() + _START
        while not there():
            self._check(but)
            if time.monotonic() > deadline:
                raise UpError(f"waited {_START:.0f} s for {what}: see the logs in {self.logs}")
            if stop.wait(0.2):
                raise _StopRequested

    def watch_over(self, stop: threading.Event) -> None:
        """Until `stop`.

        Raises:
            UpError: a child ended.
        """
        while not stop.wait(0.5):
            self._check(None)

    def _check(self, but: _Child | None) -> None:
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
            _end([child.process.pid for child in children])
            for child in children:
                child.process.wait()
        _state_file(self.workspace).unlink(missing_ok=True)


def up_detached(workspace: Workspace, arguments: Sequence[str], tell: Callable[[str], None]) -> None:
    """Run `copal up ARGUMENTS` in the background; returns when all is up.

    Raises:
        UpError: it did not come up; says why.
    """
    _refuse_if_up(workspace)
    logs = workspace.private / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / "up.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            isolated_python("flows.cli", "up", "--workspace", str(workspace.root), *arguments),
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=isolated_environment(),
            start_new_session=True,
        )
    try:
        while not _is_ready(workspace, process.pid):
            try:
                process.wait(0.2)
            except subprocess.TimeoutExpired:
                continue
            said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it said nothing"]
            raise UpError(said[-1].removeprefix("copal: "))
    except BaseException:
        process.terminate()
        process.wait()
        raise
    tell(log.read_text(encoding="utf-8").rstrip())


def down(workspace: Workspace) -> bool:
    """End what `copal up` runs in this workspace, and wait for the end.

    Returns:
        Whether anything ran.
    """
    stack = read_stack(workspace)
    if stack is None:
        return False
    ran = _end_known([stack.supervisor], limit=4 * _END)  # it ends its children, in turn
    return _end_leftovers(workspace) or ran


# --- the state file


def read_stack(workspace: Workspace) -> Stack | None:
    """What runs in the workspace, or ran when its supervisor was killed; None where nothing was left behind."""
    try:
        found = json.loads(_state_file(workspace).read_text(encoding="utf-8"))
        return Stack(
            supervisor=Process(**found.pop("supervisor")),
            children=tuple(Process(**child) for child in found.pop("children")),
            **found,
        )
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError, KeyError, AttributeError):  # not ours, or of another release
        return None


def is_up(workspace: Workspace) -> Stack | None:
    """What runs in the workspace; None where its supervisor does not live."""
    stack = read_stack(workspace)
    return (
        stack
        if stack is not None and find_process(stack.supervisor.pid, stack.supervisor.started) is not None
        else None
    )


def _state_file(workspace: Workspace) -> Path:
    return workspace.private / "up.json"


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


# --- processes


def _identify(name: str, pid: int) -> Process:
    import psutil

    try:
        return Process(name=name, pid=pid, started=psutil.Process(pid).create_time())
    except psutil.NoSuchProcess:  # it ended at once; whoever waits for it says so
        return Process(name=name, pid=pid, started=0.0)


def _end_leftovers(workspace: Workspace) -> bool:
    """End what a killed supervisor left, and remove its state file; whether there was anything that ran."""
    stack = read_stack(workspace)
    ran = _end_known(stack.children, limit=_END) if stack is not None else False
    _state_file(workspace).unlink(missing_ok=True)
    return ran


def _lives(process: Process) -> bool:
    return find_process(process.pid, process.started) is not None


def _end_known(processes: Sequence[Process], *, limit: float) -> bool:
    alive = [process.pid for process in processes if _lives(process)]
    _end(alive, limit)
    return bool(alive)


def _end(pids: Sequence[int], limit: float = _END) -> None:
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
    psutil.wait_procs(rest, timeout=_END)


@contextmanager
def _stop_on_signals() -> Iterator[threading.Event]:
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


def _environment(home: Path, api: str, registry: str) -> dict[str, str]:
    """Of the children: the user's, but for what would bring Prefect to another server or profile."""
    found = {name: value for name, value in isolated_environment().items() if not name.startswith("PREFECT_")}
    found.pop("MLFLOW_TRACKING_URI", None)
    for name in ("NO_PROXY", "no_proxy"):  # a proxy of the user's is not for what runs on this machine
        found[name] = ",".join(filter(None, (found.get(name), _HOST, "localhost")))
    return found | _PREFECT | {"PREFECT_HOME": str(home), "PREFECT_API_URL": api, "COPAL_REGISTRY_URI": registry}


# --- ports, the deployments' file, and the Prefect server's API


def _check_port(port: int, option: str) -> None:
    with socket.socket() as found:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what closed a second ago is not in use
        try:
            found.bind((_HOST, port))
        except OSError as error:
            raise UpError(f"port {port} is in use ({error.strerror}): choose another one with {option}") from error


def prefect_file() -> Path:
    """infra/prefect.yaml: of the checkout, or as installed with the package.

    Raises:
        UpError: it is not there.
    """
    places = (
        Path(__file__).parents[1] / "infra" / "prefect.yaml",
        Path(sysconfig.get_path("data")) / "share" / "copal" / "prefect.yaml",
    )
    for place in places:
        if place.is_file():
            return place
    raise UpError(f"{places[0]} is missing, and so is {places[1]}: install copal anew")


def render_prefect_file(
    template: Path, workspace: Workspace, settings: Settings, *, registry: str | None, devices: str | None
) -> str:
    """The deployments of a workspace: infra/prefect.yaml with its folder, schedule, registry and devices filled in."""
    import yaml

    content = yaml.safe_load(template.read_text(encoding="utf-8"))
    for deployment in content["deployments"]:
        deployment["parameters"]["workspace"] = str(workspace.root)
        variables = deployment["work_pool"]["job_variables"]["env"]
        if registry is not None:
            variables["COPAL_REGISTRY_URI"] = registry
        if deployment["name"] == "watch":
            watch = settings.watch
            deployment["schedules"] = [{"cron": watch.cron} if watch.cron else {"interval": watch.interval}]
        elif devices is not None and deployment["work_pool"]["name"] == _GPU_POOL:
            variables["CUDA_VISIBLE_DEVICES"] = devices
    return yaml.safe_dump(content, sort_keys=False)


def _is_server(uri: str | None) -> bool:
    return uri is not None and uri.startswith(("http://", "https://"))


def _create_pools(api: str) -> None:
    there = {pool["name"] for pool in _call(api, "POST", "/work_pools/filter", {})}
    for name in POOLS:
        if name not in there:  # the worker fills in what jobs of its type can be told
            _call(api, "POST", "/work_pools/", {"name": name, "type": "process"})


def _settle_old_runs(api: str) -> None:
    """Runs whose processes ended with an earlier server are said to have; checks that it slept through are dropped."""
    now = datetime.now(UTC).isoformat()
    ours = {"work_pools": {"name": {"any_": list(POOLS)}}}
    lost = {"flow_runs": {"state": {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}}}
    for run in _call(api, "POST", "/flow_runs/filter", ours | lost):
        state = {"type": "CRASHED", "message": "The machine or `copal up` ended while this ran."}
        _call(api, "POST", f"/flow_runs/{run['id']}/set_state", {"state": state, "force": True})
    late = {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}, "expected_start_time": {"before_": now}}}
    for run in _call(api, "POST", "/flow_runs/filter", ours | late):
        if run["auto_scheduled"]:
            _call(api, "DELETE", f"/flow_runs/{run['id']}")


def _has_worker(api: str, pool: str) -> bool:
    return bool(_call(api, "POST", f"/work_pools/{pool}/workers/filter", {}))


def _answers(url: str) -> bool:
    try:
        with _opener().open(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:  # URLError is one
        return False


def _call(api: str, method: str, path: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{api}{path}", data, {"Content-Type": "application/json"}, method=method)
    for rest in reversed(range(_TRIES)):
        try:
            with _opener().open(request, timeout=60) as answer:
                content = answer.read()
            break
        except OSError as error:
            busy = isinstance(error, urllib.error.HTTPError) and error.code == 503  # somebody else writes its database
            if not busy or not rest:
                raise UpError(f"the Prefect server at {api} refuses {method} {path}: {error}") from error
            time.sleep(1.0)
    return json.loads(content) if content else None


def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback: no proxy
