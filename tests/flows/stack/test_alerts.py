"""A team's webhook is called where gates failed, a champion moved or a run failed: on a real Prefect server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Queue

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.events.worker import EventsWorker
from prefect.settings import PREFECT_API_URL

from flows.gates.judge import GateResult
from flows.runs.events import tell_champion, tell_gates
from flows.stack.alerts import ensure_alerts
from flows.stack.prefect_server import UpError

pytestmark = pytest.mark.team

NAMES = ["copal gates failed", "copal champion moved", "copal runs failed"]


@pytest.fixture(autouse=True)
def _events_of_this_server(prefect: None) -> None:
    """A process has one sender of events, whichever server it was made for: here none of an earlier test."""
    EventsWorker.instance().drain()


@pytest.fixture
def receiver() -> Iterator[tuple[str, Queue[str]]]:
    """A URL, and the texts that were sent there."""
    texts: Queue[str] = Queue()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            texts.put(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/hook?token=hunter2", texts
        server.shutdown()


@flow(name="verify", flow_run_name="verify tiny")
def fails() -> None:
    raise RuntimeError("one file differs")


def test_the_webhook_is_called_for_what_a_team_wants_to_know(receiver):
    url, texts = receiver
    api = str(PREFECT_API_URL.value())
    for _ in range(2):  # again changes nothing
        assert ensure_alerts(api, None, url) == NAMES
    with get_client(sync_client=True) as client:
        there = client.read_automations()
    assert sorted(found.name for found in there) == sorted(NAMES)
    assert "hunter2" not in "".join(found.model_dump_json() for found in there)

    good = GateResult(name="dense", passed=True, value=1.5, limit=2.0, detail="fine")
    bad = GateResult(name="forgetting", passed=False, value=0.4, limit=0.15, detail="legal is worse")
    tell_gates("tiny", 3, [good])
    tell_gates("tiny", 4, [good, bad])
    tell_champion("tiny", 3, "asked for")
    with pytest.raises(RuntimeError):
        fails()
    told = sorted(texts.get(timeout=120) for _ in range(3))
    assert told[1:] == ["tiny version 3 is the champion: asked for", "tiny version 4: gates failed: forgetting"]
    assert told[0].startswith("the run verify tiny is Failed:")
    assert texts.empty()


def test_a_server_that_is_away_is_one_line():
    with pytest.raises(UpError, match="the alerts could not be made on the Prefect server at http://127") as caught:
        ensure_alerts("http://127.0.0.1:9/api", None, "http://x/?token=hunter2")
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)
