from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from flows.cli import main
from flows.isolated import isolated_environment
from flows.runs import artifacts
from flows.runs.artifacts import show_gates
from flows.runs.server import ServerError, on_server


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_a_server_that_does_not_answer_is_said_in_one_line_before_anything_is_begun():
    url = f"http://127.0.0.1:{free_port()}/api"
    with temporary_settings({PREFECT_API_URL: url}), pytest.raises(ServerError) as caught, on_server():
        pytest.fail("nothing is begun")
    said = str(caught.value)
    assert said.startswith(f"the Prefect server at {url} does not answer (")
    assert "unset PREFECT_API_URL" in said
    assert said.isprintable()


class Guarded(BaseHTTPRequestHandler):
    """Tells everybody that it is well, and nobody anything else."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/api/health" else 401)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_a_server_that_wants_another_auth_string_is_said_in_one_line_too():
    with ThreadingHTTPServer(("127.0.0.1", 0), Guarded) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/api"
        known = {PREFECT_API_URL: url, PREFECT_API_AUTH_STRING: "copal:a-guess"}
        with temporary_settings(known), pytest.raises(ServerError) as caught, on_server():
            pytest.fail("nothing is begun")
        server.shutdown()
    said = str(caught.value)
    assert said.startswith(f"the Prefect server at {url} does not let us in (HTTP 401): set PREFECT_API_AUTH_STRING")
    assert "a-guess" not in said


@pytest.mark.usefixtures("prefect")
def test_a_server_that_goes_away_under_a_flow_is_said_in_one_line():
    url = PREFECT_API_URL.value()
    with pytest.raises(ServerError) as caught, on_server():
        raise httpx.ConnectError("refused\nby whom")
    assert str(caught.value).startswith(
        f"the Prefect server at {url} went away while this ran (refused): start it and run"
    )


def test_a_table_that_cannot_be_shown_fails_no_step(caplog, monkeypatch):
    for name, value in (("handlers", [caplog.handler]), ("level", logging.WARNING), ("disabled", False)):
        monkeypatch.setattr(artifacts._log, name, value)  # Prefect's loggers keep what they hear, and others set them
    away = {PREFECT_API_URL: f"http://127.0.0.1:{free_port()}/api", PREFECT_CLIENT_MAX_RETRIES: 0}
    with temporary_settings(away):
        show_gates("tiny", 2, [])
    assert "the table tiny-gates is not shown" in caplog.text


@pytest.mark.usefixtures("by_hand")
def test_where_none_is_named_an_error_of_a_network_is_not_of_prefect():
    with pytest.raises(httpx.ConnectError), on_server():
        raise httpx.ConnectError("of a model hub")


_NAMED = "http://127.0.0.1:9/api"


@pytest.mark.parametrize(
    ("variables", "files"),
    [
        ({"PREFECT_API_URL": _NAMED}, {}),
        ({"prefect_api_url": _NAMED}, {}),
        (
            {"PREFECT_HOME": "at"},
            {"at/profiles.toml": f'active = "team"\n[profiles.team]\nPREFECT_API_URL = "{_NAMED}"'},
        ),
        (
            {"PREFECT_PROFILES_PATH": "mine.toml", "PREFECT_PROFILE": "team"},
            {"mine.toml": f'[profiles.team]\nPREFECT_API_URL = "{_NAMED}"'},
        ),
        ({}, {"home/.prefect/profiles.toml": f'active = "a"\n[profiles.a]\nPREFECT_API_URL = "{_NAMED}"'}),
        ({}, {".env": f"PREFECT_API_URL={_NAMED}"}),
        ({}, {"prefect.toml": f'[api]\nurl = "{_NAMED}"'}),
        ({}, {"pyproject.toml": f'[tool.prefect.api]\nurl = "{_NAMED}"'}),
    ],
)
def test_every_place_where_prefect_looks_for_a_server(variables, files, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert asked(tmp_path, variables) == f"ServerError the Prefect server at {_NAMED} does not answer"


def test_where_no_place_names_one_prefect_is_not_asked(tmp_path):
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'mine'\n")
    assert asked(tmp_path, {"PREFECT_LOGGING_LEVEL": "WARNING"}) == "by hand False"


def test_an_empty_url_names_none_so_that_prefect_starts_no_server_of_its_own(tmp_path):
    assert asked(tmp_path, {"PREFECT_API_URL": ""}) == "by hand True"


def asked(folder: Path, variables: dict[str, str]) -> str:
    """What a process in `folder` is told, with these variables and the user's folder at `folder`/home."""
    program = """
import sys
from flows.runs.server import ServerError, on_server
try:
    with on_server() as server:
        print("server" if server else "by hand", "prefect" in sys.modules)
except ServerError as error:
    print("ServerError", str(error).partition(" (")[0])
"""
    inherited = {name: value for name, value in isolated_environment().items() if not name.startswith("PREFECT")}
    environment = inherited | {"HOME": str(folder / "home")} | variables
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("name", ["NO_PROXY", "no_proxy"])
def test_this_machine_is_never_reached_through_a_proxy(monkeypatch, capsys, name):
    monkeypatch.setenv(name, "intranet")
    assert main(["--version"]) == 0
    assert os.environ[name].split(",") == ["intranet", "127.0.0.1", "localhost", "::1"]
