"""Running it for a team: one real stack (servers, deployments, workers) for all tests here, ended by the last ones."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

import flows
from flows.cli import main
from flows.data.dataset import MissingDataError
from flows.data.git import commit, git
from flows.params import load_settings
from flows.project import hold_lineage
from flows.runs.dispatch import AdaptFailedError
from flows.settings import WatchSettings
from flows.stack.access import Access, access_file, link_file, read_access
from flows.stack.deployments import prefect_file, render_prefect_file
from flows.stack.prefect_server import UpError
from flows.stack.state import Process, is_up, read_stack
from flows.stack.up import down, up_detached
from flows.watch import run_adapt
from support.servers import free_port
from support.waiting import until

INTERVAL = 10  # seconds of the schedule
COPAL = (sys.executable, "-P", "-m", "flows.cli")  # as the installed script: where it runs is not on its path
LONG = (
    "{window_length: 32, windows: 8, evaluation_windows: 8, evaluation_share: 0.4}",
    "{window_length: 32, windows: 20000, evaluation_windows: 8, evaluation_share: 0.4}",
)


class Recorder(socketserver.ThreadingTCPServer):
    """A proxy that writes down who asks it for what, and gives nothing."""

    daemon_threads = True

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        asked = self.asked

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                asked.append(self.rfile.readline())

        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@dataclass(frozen=True)
class Running:
    """A stack that runs, and what a test asks it."""

    bench: Any
    port: int
    environment: dict[str, str]
    recorder: Recorder

    @property
    def api(self) -> str:
        return f"http://127.0.0.1:{self.port}/api"

    @property
    def access(self) -> Access:
        return read_access(access_file(self.bench.workspace))

    def call(self, path: str, body: Any = None, method: str = "POST") -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Basic {self.access.basic}"}
        if method != "GET":
            token = self.call("/csrf-token?client=tests", method="GET")["token"]
            headers |= {"Prefect-Csrf-Client": "tests", "Prefect-Csrf-Token": token}
        request = urllib.request.Request(f"{self.api}{path}", data, headers, method=method)

        def answer() -> list[bytes]:
            try:
                with urllib.request.urlopen(request, timeout=120) as found:
                    return [found.read()]
            except urllib.error.HTTPError as error:
                if error.code != 503:  # its database is locked, which it says after a minute
                    raise
                return []

        (content,) = until(answer, 240, "an answer of the server")
        return json.loads(content) if content else None

    def deployment(self, name: str) -> Any:
        return self.call(f"/deployments/name/{name}/{name}", method="GET")

    def runs(self, name: str) -> list[Any]:
        """The runs of a deployment, oldest first."""
        wanted = {"deployments": {"name": {"any_": [name]}}, "sort": "EXPECTED_START_TIME_ASC", "limit": 200}
        return list(self.call("/flow_runs/filter", wanted))

    def domains(self) -> list[str]:
        """Of the versions, oldest first."""
        return [version.tags["copal.domain"] for version in self.bench.registry.versions()[1:]]

    def start(self, name: str, **parameters: Any) -> str:
        """Create a run of a deployment; its id."""
        body = {"state": {"type": "SCHEDULED"}, "parameters": parameters}
        return str(self.call(f"/deployments/{self.deployment(name)['id']}/create_flow_run", body)["id"])

    def state(self, run: str) -> str:
        return str(self.call(f"/flow_runs/{run}", method="GET")["state"]["type"])

    def log(self, run: str) -> list[str]:
        """The lines that the page of a run shows."""
        wanted = {"logs": {"flow_run_id": {"any_": [run]}}, "limit": 200}
        return [line["message"] for line in self.call("/logs/filter", wanted)]

    def settle(self) -> None:
        """Wait until no run is under way."""

        def idle() -> bool:
            runs = self.runs("watch") + self.runs("adapt")
            return all(run["end_time"] for run in runs)

        until(idle, 120, "all runs to end")


def command(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COPAL, *map(str, arguments)], capture_output=True, text=True, timeout=200, check=False, **options
    )


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Of the commands that are run: this process's, without a user's git settings; `flows` is the one under test."""
    here = str(Path(flows.__file__).parents[1])
    path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}


@pytest.fixture(scope="module")
def stack(make_bench, environment, tmp_path_factory) -> Iterator[Running]:
    """`copal up --detach` in a workspace whose schedule is short, behind a proxy that writes down what is asked.

    It is run in the workspace, whose repository has packages `flows` and `copal` of its own that nobody can import.
    """
    bench = make_bench(tmp_path_factory.mktemp("team") / "workspace")
    for name in ("flows", "copal"):
        (bench.root / name).mkdir()
        (bench.root / name / "__init__.py").write_text("raise SystemExit('imported what lies in the repository')\n")
    git(bench.root, "add", "flows", "copal")
    commit(bench.root, "Packages of our own")
    with bench.workspace.params.open("a") as params:
        params.write(f"watch: {{interval: {INTERVAL}}}\n")
    with Recorder() as recorder:
        threading.Thread(target=recorder.serve_forever, daemon=True).start()
        proxies = {f"{scheme}_PROXY": recorder.url for scheme in ("HTTP", "HTTPS", "ALL")}
        port, mlflow_port = free_port(), free_port()
        ports = ("--port", port, "--mlflow-port", mlflow_port)
        settings = environment | proxies | {"NO_PROXY": "127.0.0.1,localhost"}
        done = command(
            "up", "--workspace", bench.root, *ports, "--devices", "7", "--detach", env=settings, cwd=bench.root
        )
        assert done.returncode == 0, done.stderr
        assert f"Prefect: http://127.0.0.1:{port}/runs\n" in done.stdout
        assert f"MLflow: http://127.0.0.1:{mlflow_port}/#/models/{bench.registry.model_name}\n" in done.stdout
        assert f"links in {link_file(bench.workspace).as_uri()}\n" in done.stdout
        assert ',%2Fruns">Prefect<' in link_file(bench.workspace).read_text()
        try:
            yield Running(bench, port, environment, recorder)
        finally:
            down(bench.workspace)
            recorder.shutdown()


@pytest.fixture
def quiet(stack: Running) -> Running:
    """The stack with its schedule paused and nothing under way: what happens now a test has made happen."""
    deployment = stack.deployment("watch")
    (schedule,) = deployment["schedules"]
    if schedule["active"]:
        stack.call(f"/deployments/{deployment['id']}/schedules/{schedule['id']}", {"active": False}, "PATCH")
    for run in stack.runs("watch"):
        if run["state"]["type"] == "SCHEDULED":
            stack.call(f"/flow_runs/{run['id']}", method="DELETE")
    stack.settle()
    return stack


# --- what is deployed, and what wakes the watcher


def test_nothing_that_up_starts_imports_from_the_folder_where_it_runs(stack: Running) -> None:
    """That steps run at all shows it for the flows; this is for every process, what it starts included."""
    known = read_stack(stack.bench.workspace)
    assert known is not None
    supervisor = psutil.Process(known.supervisor.pid)
    family = [supervisor, *supervisor.children(recursive=True)]
    assert len(family) >= 5  # itself, two servers, two workers
    assert [process.cmdline() for process in family if process.environ().get("PYTHONSAFEPATH") != "1"] == []


def test_up_deploys_the_flows_with_pools_limits_schedules_and_a_trigger(stack: Running) -> None:
    results = str(stack.bench.workspace.private / "results")
    for name, pool, devices, collision in (
        ("watch", "copal-cpu", "", "CANCEL_NEW"),
        ("adapt", "copal-gpu", "7", "ENQUEUE"),
        ("withdraw", "copal-gpu", "7", "ENQUEUE"),
    ):
        found = stack.deployment(name)
        assert found["work_pool_name"] == pool
        assert found["parameters"] == {"workspace": str(stack.bench.root)}
        assert found["global_concurrency_limit"]["limit"] == 1
        assert found["concurrency_options"]["collision_strategy"] == collision
        assert found["job_variables"]["env"]["PREFECT_RESULTS_LOCAL_STORAGE_PATH"] == results
        assert found["job_variables"]["env"]["CUDA_VISIBLE_DEVICES"] == devices
        assert found["job_variables"]["env"]["COPAL_REGISTRY_URI"].startswith("http://127.0.0.1:")
        assert found["job_variables"]["env"]["COPAL_LEDGER_URI"] == f"sqlite:///{stack.bench.root}/.copal/ledger.db"
        assert stack.call(f"/work_pools/{pool}", method="GET")["type"] == "process"
    for name in ("promote", "rollback", "verify"):
        found = stack.deployment(name)
        assert found["work_pool_name"] == "copal-cpu"
        assert found["parameters"] == {"workspace": str(stack.bench.root)}
        assert found["job_variables"]["env"]["CUDA_VISIBLE_DEVICES"] == ""
        assert found["job_variables"]["env"]["COPAL_REGISTRY_URI"].startswith("http://127.0.0.1:")
        assert found["job_variables"]["env"]["COPAL_LEDGER_URI"] == f"sqlite:///{stack.bench.root}/.copal/ledger.db"
    (schedule,) = stack.deployment("watch")["schedules"]
    assert schedule["schedule"]["interval"] == INTERVAL
    (daily,) = stack.deployment("verify")["schedules"]
    assert daily["schedule"]["cron"] == "0 3 * * *"
    (automation,) = stack.call("/automations/filter", {})
    assert automation["trigger"]["expect"] == ["copal.dataset.version.created"]
    assert automation["trigger"]["match"] == {"prefect.resource.id": "copal.dataset.*"}
    (action,) = automation["actions"]
    assert action["deployment_id"] == stack.deployment("watch")["id"]
    assert not action["parameters"]


def test_the_schedule_fires_and_a_committed_domain_becomes_a_version(stack: Running) -> None:
    stack.bench.commit("code", seed=1)
    until(lambda: stack.domains() == ["code"], 150, "a version")
    (run,) = until(
        lambda: [run for run in stack.runs("adapt") if run["state"]["type"] == "COMPLETED"], 20, "the end of its run"
    )
    assert run["parameters"]["domain"] == "code"
    assert run["parent_task_run_id"], "it is shown as a part of the watcher's run"
    assert run["name"] == f"adapt code {stack.bench.registry.head().tags['copal.git_rev'][:8]}"
    said = until(lambda: [line for line in stack.log(run["id"]) if line.startswith("version 2")], 20, "the run's log")
    assert said[0].startswith("version 2 of tiny: adapted to code; ")


def test_an_event_of_prefects_own_command_wakes_the_watcher(quiet: Running) -> None:
    before = {run["id"] for run in quiet.runs("watch")}
    emit = ("event", "emit", "copal.dataset.version.created", "--resource-id", "copal.dataset.x")
    let_in = dict(line.split("=", 1) for line in access_file(quiet.bench.workspace).read_text().splitlines())
    environment = quiet.environment | let_in | {"PREFECT_HOME": str(quiet.bench.root / ".copal/x")}
    subprocess.run([sys.executable, "-m", "prefect", *emit], env=environment, check=True, capture_output=True)
    until(lambda: {run["id"] for run in quiet.runs("watch")} - before, 30, "a run of the watcher")


def test_notify_wakes_the_watcher_and_says_what_changed(quiet: Running) -> None:
    quiet.bench.commit("legal", seed=2)
    done = command("notify", "--workspace", quiet.bench.root, "legal", env=quiet.environment)
    assert done.stdout == f"notified {quiet.api} of legal\n", done.stderr
    until(lambda: quiet.domains() == ["code", "legal"], 150, "a version")
    events = {"event": {"name": ["copal.dataset.version.created"]}, "resource": {"id": ["copal.dataset.legal"]}}
    (event,) = until(lambda: quiet.call("/events/filter", {"filter": events})["events"], 20, "the event")
    version = quiet.bench.registry.head()
    assert event["payload"] == {
        "domain": "legal",
        "md5": version.tags["copal.dvc_md5"],
        "git_rev": version.tags["copal.git_rev"],
        "repository": str(quiet.bench.root),
    }


@pytest.mark.slow  # so its file, the longest of the team's, comes first
def test_with_the_hook_a_burst_of_commits_ends_in_versions_in_commit_order(quiet: Running) -> None:
    done = command("hook", "install", "--workspace", quiet.bench.root, env=quiet.environment)
    assert done.returncode == 0, done.stderr
    path = os.environ.get("PYTHONPATH")
    try:
        os.environ["PYTHONPATH"] = quiet.environment["PYTHONPATH"]  # the hook finds flows where this process has it
        for seed, domain in enumerate(("zulu", "alpha", "mike"), 3):
            quiet.bench.commit(domain, seed)
    finally:
        os.environ.pop("PYTHONPATH")
        os.environ |= {} if path is None else {"PYTHONPATH": path}
        command("hook", "uninstall", "--workspace", quiet.bench.root, env=quiet.environment)
    until(lambda: quiet.domains()[2:] == ["zulu", "alpha", "mike"], 300, "three versions")
    quiet.settle()
    assert len(quiet.domains()) == 5


def test_a_worker_promotes_and_verifies(quiet: Running) -> None:
    promotion = quiet.start("promote", version="1", why="ticket 12")
    until(lambda: quiet.state(promotion) == "COMPLETED", 60, "the promotion")
    assert quiet.bench.registry.alias("champion") == 1
    verification = quiet.start("verify", version="champion")
    until(lambda: quiet.state(verification) == "COMPLETED", 60, "the verification")
    until(lambda: "version 1: nothing differs" in quiet.log(verification), 20, "the run's log, which comes after it")
    refused = quiet.start("promote", version="nobody")
    until(lambda: quiet.state(refused) == "FAILED", 60, "the refusal")


def test_two_watchers_at_the_same_time_make_one_version(quiet: Running) -> None:
    quiet.bench.commit("twin", seed=8)
    run = quiet.start("watch")
    done = command(
        "watch", "--once", "--workspace", quiet.bench.root, env=quiet.environment | {"PREFECT_API_URL": quiet.api}
    )
    assert done.returncode == 0, done.stderr
    until(lambda: quiet.state(run) == "COMPLETED", 150, "the watcher on the worker")
    assert quiet.domains().count("twin") == 1


# --- what a caller hears of a step on a worker


def here(stack: Running, domain: str) -> int | None:
    """`run_adapt` from this process, by way of the stack's server."""
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: stack.api, PREFECT_API_AUTH_STRING: stack.access.auth_string}):
        return run_adapt(str(stack.bench.root), domain, None)


def test_missing_data_on_a_worker_is_missing_data_for_the_caller(quiet: Running) -> None:
    quiet.bench.commit("ghost", seed=9)
    cache = quiet.bench.root / ".dvc" / "cache"
    cache.rename(cache.with_name("away"))
    try:
        with pytest.raises(MissingDataError, match="ghost"):
            here(quiet, "ghost")
    finally:
        shutil.rmtree(cache, ignore_errors=True)
        cache.with_name("away").rename(cache)
    number = here(quiet, "ghost")
    assert number == quiet.bench.registry.head().number
    assert here(quiet, "ghost") is None, "it is known"


def test_cancelling_a_step_stops_its_process_within_15_seconds(quiet: Running) -> None:
    quiet.bench.set(*LONG)
    quiet.bench.commit("slow", seed=10, documents=8000)
    heard: list[BaseException] = []

    def call() -> None:
        try:
            here(quiet, "slow")
        except BaseException as error:  # noqa: BLE001 - whatever it is, the test looks at it
            heard.append(error)

    caller = threading.Thread(target=call)
    caller.start()
    run, process = until(lambda: busy(quiet), 240, "a step that prunes")
    began = time.monotonic()
    quiet.call(f"/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})
    until(lambda: not alive(process), 15, "its process to end")
    ended = time.monotonic() - began
    # Before the state comes, Prefect starts a process that looks for hooks: it imports what the flow imports.
    until(lambda: quiet.state(run) == "CANCELLED", 90, "the state of the run")
    print(f"\nafter the call its process ended in {ended:.1f} s, its state said so in {time.monotonic() - began:.1f} s")
    caller.join(30)
    assert [type(error) for error in heard] == [AdaptFailedError]
    assert str(heard[0]) == "slow: the step was cancelled"
    began = time.monotonic()
    with hold_lineage(quiet.bench.project, "whoever comes next"):
        assert time.monotonic() - began < 15, "the lineage is free"


def busy(stack: Running) -> tuple[str, psutil.Process] | None:
    """The run of a step that prunes now, and its process."""
    runs = [run for run in stack.runs("adapt") if run["state"]["type"] == "RUNNING"]
    tasks = {"task_runs": {"name": {"like_": "prune"}, "state": {"type": {"any_": ["RUNNING"]}}}}
    wanted = {"flow_runs": {"id": {"any_": [run["id"] for run in runs]}}} | tasks
    if not runs or not stack.call("/task_runs/filter", wanted):
        return None
    children = read_stack(stack.bench.workspace).children  # type: ignore[union-attr]
    worker = next(child for child in children if child.name == "worker copal-gpu")
    (process,) = psutil.Process(worker.pid).children()
    return runs[0]["id"], process


# --- up again, and the end


def test_what_is_up_is_not_started_again(stack: Running) -> None:
    done = command("up", "--workspace", stack.bench.root, "--port", free_port(), env=stack.environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"copal is up in {stack.bench.root} already" in done.stderr
    assert is_up(stack.bench.workspace)


def test_down_ends_everything_and_a_step_that_runs_is_told(quiet: Running) -> None:
    quiet.start("adapt", domain="slow")
    run, _ = until(lambda: busy(quiet), 240, "a step that prunes")
    known = read_stack(quiet.bench.workspace)
    assert known is not None
    supervisor = psutil.Process(known.supervisor.pid)
    family = [supervisor, *supervisor.children(recursive=True)]
    assert len(family) >= 6  # itself, two servers, two workers, the step
    done = command("down", env=quiet.environment, cwd=quiet.bench.root)
    assert done.stdout == f"ended what ran in {quiet.bench.root}\n", done.stderr
    assert [process for process in family if alive(process)] == []
    assert not (quiet.bench.root / ".copal" / "up.json").exists()
    assert not access_file(quiet.bench.workspace).exists()
    assert not link_file(quiet.bench.workspace).exists()
    log = (quiet.bench.root / ".copal" / "logs" / "worker-copal-gpu.log").read_text()
    assert "SIGTERM" in log.rpartition(run)[2], "the step was not asked"
    assert quiet.recorder.asked == [], "something asked beyond this machine"
    with pytest.raises(OSError):  # the recorder would have known
        urllib.request.build_opener(urllib.request.ProxyHandler({"http": quiet.recorder.url})).open("http://x.invalid/")
    assert len(quiet.recorder.asked) == 1


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


# --- starting: a server that starts is enough


@dataclass(frozen=True)
class Beginning:
    """A `copal up` that has started its servers, and is not further yet."""

    bench: Any
    supervisor: subprocess.Popen[str]
    children: tuple[Process, ...]

    def family(self) -> list[psutil.Process]:
        return [psutil.Process(child.pid) for child in self.children]


@pytest.fixture
def beginning(bench, environment) -> Iterator[Beginning]:
    ports = ("--port", str(free_port()), "--mlflow-port", str(free_port()))
    with subprocess.Popen(
        [*COPAL, "up", "--quiet", "--workspace", str(bench.root), *ports],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as supervisor:
        try:
            until(lambda: (found := read_stack(bench.workspace)) and len(found.children) == 2, 60, "the servers")
            known = read_stack(bench.workspace)
            assert known is not None
            yield Beginning(bench, supervisor, known.children)
        finally:
            down(bench.workspace)
            supervisor.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_all_of_it(beginning: Beginning, number: signal.Signals) -> None:
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("these tests run under nohup, and so does what they start")
    family = beginning.family()
    beginning.supervisor.send_signal(number)
    _, said = beginning.supervisor.communicate(timeout=60)
    assert (beginning.supervisor.returncode, said) == (0, "")
    assert [process for process in family if alive(process)] == []
    assert read_stack(beginning.bench.workspace) is None


def test_a_child_that_dies_ends_all_of_it_and_is_named(beginning: Beginning) -> None:
    mlflow, prefect = sorted(beginning.family(), key=lambda process: "prefect" in process.cmdline())
    mlflow.kill()
    _, said = beginning.supervisor.communicate(timeout=60)
    assert beginning.supervisor.returncode == 2
    log = beginning.bench.root / ".copal" / "logs" / "mlflow-server.log"
    assert said.startswith("copal: mlflow server ended by itself (exit status -9)")
    assert said.endswith(f"see {log}\n")
    assert not alive(prefect)
    assert read_stack(beginning.bench.workspace) is None


def test_down_ends_what_a_killed_supervisor_left(beginning: Beginning) -> None:
    beginning.supervisor.kill()
    beginning.supervisor.wait()
    assert is_up(beginning.bench.workspace) is None
    assert all(alive(process) for process in beginning.family())
    family = beginning.family()
    assert down(beginning.bench.workspace)
    assert [process for process in family if alive(process)] == []
    assert not down(beginning.bench.workspace)


# --- what is refused


@pytest.fixture
def refused(bench: Any, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """refused(*arguments) -> the one line that a refused command prints."""

    def call(name: str, *arguments: object) -> str:
        assert main([name, "--workspace", str(bench.root), *map(str, arguments)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        return err

    return call


@pytest.mark.parametrize("option", ["--port", "--mlflow-port"])
def test_a_port_in_use_is_named_with_the_option_that_changes_it(refused, bench, option: str) -> None:
    ports = {"--port": free_port(), "--mlflow-port": free_port()}
    with socket.create_server(("127.0.0.1", ports[option])):
        said = refused("up", *(word for pair in ports.items() for word in pair))
    assert said.startswith(f"copal: port {ports[option]} is in use")
    assert said.endswith(f"choose another one with {option}\n")
    assert not (bench.root / ".copal" / "prefect").exists(), "something was started"


def test_why_it_does_not_come_up_in_the_background_is_said(bench, environment, monkeypatch) -> None:
    monkeypatch.setattr(os, "environ", environment)
    port = free_port()
    with (
        socket.create_server(("127.0.0.1", port)),
        pytest.raises(UpError, match=f"^port {port} is in use .* with --port$"),
    ):
        up_detached(bench.workspace, ("--port", str(port)), print)


def test_a_stale_state_file_kills_nobody(bench) -> None:
    bystander = psutil.Process()  # this process has the number that another one had
    state = {
        "supervisor": {"name": "copal up", "pid": bystander.pid, "started": bystander.create_time() - 1000},
        "children": [{"name": "prefect server", "pid": bystander.pid, "started": bystander.create_time() - 999}],
        "workspace": str(bench.root),
        "prefect": "http://127.0.0.1:1/api",
        "registry": "http://127.0.0.1:2",
        "ready": True,
    }
    path = bench.root / ".copal" / "up.json"
    path.write_text(json.dumps(state))
    assert is_up(bench.workspace) is None
    assert not down(bench.workspace)
    assert not path.exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"supervisor": 1, "children": []}', "\x00"])
def test_a_state_file_that_is_none_of_ours_is_no_stack(bench, text: str) -> None:
    (bench.root / ".copal" / "up.json").write_text(text)
    assert read_stack(bench.workspace) is None


# --- the deployments' file


def test_a_cron_expression_goes_before_the_interval(bench) -> None:
    with bench.workspace.params.open("a") as params:
        params.write('watch: {interval: 5, cron: "0 3 * * 1-5"}\n')
    settings = load_settings(bench.workspace.params)
    text = render_prefect_file(prefect_file(), bench.workspace, settings, registry=None, devices=None)
    watch, adapt, *others = yaml.safe_load(text)["deployments"]
    assert watch["schedules"] == [{"cron": "0 3 * * 1-5"}]
    assert [other["name"] for other in others] == ["withdraw", "promote", "rollback", "verify"]
    assert {"COPAL_REGISTRY_URI", "COPAL_LEDGER_URI"}.isdisjoint(adapt["work_pool"]["job_variables"]["env"])
    assert "CUDA_VISIBLE_DEVICES" not in adapt["work_pool"]["job_variables"]["env"]
    assert WatchSettings().cron is None


@pytest.mark.parametrize("ledger", [None, "postgresql://copal:secret@db/copal"])
def test_deployments_name_the_ledger_of_the_workspace_and_no_password(bench, ledger: str | None) -> None:
    with bench.workspace.params.open("a") as params:
        params.write(f"ledger: {{uri: {ledger or 'null'}}}\n")
    settings = load_settings(bench.workspace.params)
    server = "http://127.0.0.1:5000"
    text = render_prefect_file(prefect_file(), bench.workspace, settings, registry=server, devices=None)
    assert "secret" not in text
    for deployment in yaml.safe_load(text)["deployments"]:
        found = deployment["work_pool"]["job_variables"]["env"]
        assert found["COPAL_REGISTRY_URI"] == server
        of_workspace = f"sqlite:///{bench.root}/.copal/ledger.db"
        assert found.get("COPAL_LEDGER_URI") == (of_workspace if ledger is None else None)
