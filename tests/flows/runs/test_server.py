from __future__ import annotations

import logging
import os
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from flows.cli import main
from flows.runs import artifacts
from flows.runs.artifacts import show_gates
from flows.runs.server import ServerError, check_server, with_server


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_a_server_that_does_not_answer_is_said_in_one_line_before_anything_is_begun():
    url = f"http://127.0.0.1:{free_port()}/api"
    with temporary_settings({PREFECT_API_URL: url}), pytest.raises(ServerError) as caught:
        check_server()
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
        with temporary_settings(known), pytest.raises(ServerError) as caught:
            check_server()
        server.shutdown()
    said = str(caught.value)
    assert said.startswith(f"the Prefect server at {url} does not let us in (HTTP 401): set PREFECT_API_AUTH_STRING")
    assert "a-guess" not in said


def test_a_server_that_goes_away_under_a_flow_is_said_in_one_line():
    with (
        temporary_settings(restore_defaults={PREFECT_API_URL}),
        pytest.raises(ServerError, match=r"^the Prefect server went away while this ran \(refused\): start it and run"),
        with_server(),
    ):
        raise httpx.ConnectError("refused\nby whom")


def test_a_table_that_cannot_be_shown_fails_no_step(caplog, monkeypatch):
    for name, value in (("handlers", [caplog.handler]), ("level", logging.WARNING), ("disabled", False)):
        monkeypatch.setattr(artifacts._log, name, value)  # Prefect's loggers keep what they hear, and others set them
    away = {PREFECT_API_URL: f"http://127.0.0.1:{free_port()}/api", PREFECT_CLIENT_MAX_RETRIES: 0}
    with temporary_settings(away):
        show_gates("tiny", 2, [])
    assert "the table tiny-gates is not shown" in caplog.text


def test_where_none_is_named_nothing_is_asked():
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        check_server()


@pytest.mark.parametrize("name", ["NO_PROXY", "no_proxy"])
def test_this_machine_is_never_reached_through_a_proxy(monkeypatch, capsys, name):
    monkeypatch.setenv(name, "intranet")
    assert main(["--version"]) == 0
    assert os.environ[name].split(",") == ["intranet", "127.0.0.1", "localhost", "::1"]
