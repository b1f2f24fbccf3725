"""A machine that others share: what another user of it, and a page in a browser, get of the servers of `copal up`."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import flows
from flows.stack.access import LET_IN, Access, access_file, link_file, read_access
from flows.stack.prefect_server import answers
from flows.stack.state import read_stack
from flows.stack.up import down
from flows.workspace import make_private, open_workspace
from support.benches import Bench
from support.nobody import as_nobody
from support.servers import free_port
from support.waiting import until

COMMAND = {"work_pool_name": "copal-cpu", "job_variables": {"command": "touch /tmp/owned"}}


@dataclass(frozen=True)
class Servers:
    """Both servers of a stack."""

    bench: Bench
    prefect: str
    mlflow: str

    @property
    def access(self) -> Access:
        return read_access(access_file(self.bench.workspace))

    @property
    def let(self) -> dict[str, str]:
        return {"Authorization": f"Basic {self.access.basic}"}


def ask(url: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, str]:
    """Status and text of the answer to a GET, or to a POST of `body`."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **(headers or {})})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=60) as answer:
            return answer.status, answer.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")


@pytest.fixture(scope="module")
def beginning(make_bench: Any) -> Iterator[Servers]:
    """Servers of a `copal up` in a workspace to which every user of the machine finds the way."""
    folder = Path(tempfile.mkdtemp(prefix="copal-shared-"))
    folder.chmod(0o755)
    bench = make_bench(folder / "workspace")
    (bench.root / ".copal").chmod(0o755)  # as an older copal left it
    port, mlflow_port = free_port(), free_port()
    found = Servers(bench, f"http://127.0.0.1:{port}", f"http://127.0.0.1:{mlflow_port}")
    ports = ("--port", str(port), "--mlflow-port", str(mlflow_port))
    command = [sys.executable, "-P", "-m", "flows.cli", "up", "--workspace", str(bench.root), *ports]
    environment = os.environ | {"PYTHONPATH": str(Path(flows.__file__).parents[1])}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True) as supervisor:
        try:
            for url in (f"{found.prefect}/api/health", f"{found.mlflow}/health"):
                until(lambda url=url: supervisor.poll() is not None or answers(url), 180, "the servers")
            yield found
        finally:
            down(bench.workspace)
            supervisor.wait()
            shutil.rmtree(folder)


@pytest.fixture
def nobody() -> Any:
    """as_nobody(call) -> what `call` gives when another user calls it."""
    if os.geteuid() != 0:
        pytest.skip("only root can be another user: these tests do not run as root")
    return as_nobody


def test_another_user_gets_nothing_of_either_server(beginning: Servers, nobody: Any) -> None:
    secret = beginning.bench.root / "params.yaml"
    asked = {
        f"{beginning.prefect}/api/flow_runs/filter": {},
        f"{beginning.prefect}/api/deployments/": COMMAND,
        f"{beginning.prefect}/api/admin/settings": None,
        f"{beginning.prefect}/api/csrf-token?client=x": None,
        f"{beginning.mlflow}/get-artifact?path=params.yaml&run_uuid={secret}": None,
        f"{beginning.mlflow}/ajax-api/2.0/mlflow/registered-models/alias": {"name": "tiny", "alias": "champion"},
        f"{beginning.mlflow}/api/2.0/mlflow/experiments/search": {"max_results": 1},
        f"{beginning.mlflow}/": None,
    }
    said = nobody(lambda: [ask(url, body)[0] for url, body in asked.items()])
    # Without a token a POST is refused before anybody asks who sends it.
    assert said == [403, 403, 401, 401, 401, 401, 401, 401]
    assert ask(f"{beginning.prefect}/api/admin/settings", headers=beginning.let)[0] == 200
    assert ask(f"{beginning.mlflow}/api/2.0/mlflow/experiments/search", {"max_results": 1}, beginning.let)[0] == 200


def test_another_user_reads_no_file_and_no_variable_of_it(beginning: Servers, nobody: Any) -> None:
    private = beginning.bench.root / ".copal"
    known = read_stack(beginning.bench.workspace)
    assert known is not None
    files = [access_file(beginning.bench.workspace), link_file(beginning.bench.workspace), private / "mlflow.db"]
    files += [Path(f"/proc/{child.pid}/environ") for child in (known.supervisor, *known.children)]
    assert all(file.read_bytes() for file in files), "its owner does"
    assert nobody(lambda: (beginning.bench.root / "params.yaml").read_text()) == (
        beginning.bench.workspace.params.read_text()
    ), "the way there is open"
    for file in files:
        assert nobody(lambda file=file: file.read_text()) == "PermissionError"
    assert nobody(lambda: [path.name for path in private.iterdir()]) == "PermissionError"


def test_the_credentials_are_in_files_of_their_owner_and_on_no_command_line(beginning: Servers) -> None:
    access, private = beginning.access, beginning.bench.root / ".copal"
    for file in (access_file(beginning.bench.workspace), link_file(beginning.bench.workspace)):
        assert file.stat().st_mode & 0o777 == 0o600
    assert private.stat().st_mode & 0o777 == 0o700
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")]
    for secret in (access.password.encode(), access.basic.encode()):
        assert [line for line in lines if secret in line] == []
        logs = [path for path in private.rglob("*") if path.is_file() and secret in path.read_bytes()]
        assert {path.name for path in logs} == ({"stack.env"} if secret == access.password.encode() else {"open.html"})


@pytest.mark.parametrize("foreign", [{"Host": "evil.example"}, {"Origin": "http://127.0.0.1:8000"}, {"Origin": "null"}])
def test_a_page_of_somebody_else_gets_nothing_even_with_the_credentials(
    beginning: Servers, foreign: dict[str, str]
) -> None:
    for url in (f"{beginning.prefect}/api/admin/version", f"{beginning.prefect}/", f"{beginning.mlflow}/"):
        assert ask(url, headers=beginning.let)[0] == 200
        assert ask(url, headers=beginning.let | foreign)[0] == 403


def test_prefect_wants_a_token_of_its_own_from_whoever_changes_something(beginning: Servers) -> None:
    url = f"{beginning.prefect}/api/flow_runs/filter"
    assert ask(url, {}, beginning.let)[0] == 403
    token = json.loads(ask(f"{beginning.prefect}/api/csrf-token?client=x", headers=beginning.let)[1])["token"]
    bearer = {"Prefect-Csrf-Client": "x", "Prefect-Csrf-Token": token}
    assert ask(url, {}, beginning.let | bearer)[0] == 200
    assert ask(url, {}, bearer)[0] == 401, "the token is no credential"


def test_nobody_else_can_listen_where_the_servers_listen(beginning: Servers) -> None:
    """Under `localhost` a browser looks at IPv6 too."""
    for url in (beginning.prefect, beginning.mlflow):
        for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            with socket.socket(family) as other:
                other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                with pytest.raises(OSError, match=r"in use|not available|not supported"):
                    other.bind((host, int(url.rpartition(":")[2])))


def test_the_link_lets_a_browser_in_and_nothing_else_does(beginning: Servers, tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium; on Debian and Ubuntu: apt-get install chromium")

    def browse(url: str, profile: str) -> str:
        options = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--dump-dom")
        command = [str(chromium), *options, f"--user-data-dir={tmp_path / profile}", url]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    links = [part.partition('"')[0] for part in link_file(beginning.bench.workspace).read_text().split('href="')[1:]]
    assert [link.partition(LET_IN)[0] for link in links] == [
        url.replace("127.0.0.1", beginning.access.host) for url in (beginning.prefect, beginning.mlflow)
    ]
    until(lambda: "Hide scheduled runs" in browse(links[0], "let in"), 120, "the page of the flow runs")
    assert "MLflow" in browse(links[1], "let in")
    assert "of a copal up that has ended" in browse(f"{links[1].partition('#')[0]}#x", "another")
    strange = browse(beginning.mlflow.replace("127.0.0.1", beginning.access.host), "another")
    assert "Experiments" not in strange


# --- the folder .copal, without servers


def test_what_copal_writes_is_closed_to_others_whoever_makes_it(tmp_path: Path, template: Path) -> None:
    shutil.copytree(template, tmp_path / "new")
    workspace = open_workspace(tmp_path / "new")
    assert not workspace.private.exists(), "looking makes nothing"
    assert make_private(workspace, workspace.runs).is_dir()
    assert workspace.private.stat().st_mode & 0o777 == 0o700
    workspace.private.chmod(0o775)  # by hand, by a copy, by an older copal
    open_workspace(tmp_path / "new")
    assert workspace.private.stat().st_mode & 0o777 == 0o700
