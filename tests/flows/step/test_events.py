"""A catalog that listens is told of steps as they happen; one that does not keeps none from going on."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from flows.lineage.openlineage import events
from flows.project import read_history
from flows.step import run as run_module
from flows.step.run import plain_tasks
from support.toys import step

pytest.importorskip("openlineage.client", reason="not installed: pip install 'copal[openlineage]'")


@pytest.fixture
def catalog(monkeypatch) -> Iterator[list[dict]]:
    """What a catalog was told."""
    told: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/api/v1/lineage"
            told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(201)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("OPENLINEAGE_URL", f"http://127.0.0.1:{server.server_port}")
        yield told
        server.shutdown()


def test_a_step_tells_its_start_and_the_event_that_the_export_has(bench, catalog):
    bench.commit("code", 0)
    made = step(bench)
    start, complete = catalog
    assert (start["eventType"], complete["eventType"]) == ("START", "COMPLETE")
    assert start["run"]["runId"] == complete["run"]["runId"]
    assert [data["name"] for data in start["inputs"]] == ["data/code", "tiny"]
    assert start["outputs"] == []
    assert complete == events(read_history(bench.project))[-1]
    assert complete["outputs"][0]["facets"]["version"]["datasetVersion"] == str(made.number)


def test_a_step_that_fails_says_why_and_the_next_is_the_same_run(bench, catalog, monkeypatch):
    bench.commit("code", 0)

    def fails(*_: object) -> None:
        raise RuntimeError("no room at postgresql://me:hunter2@db/x")

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_make", fails)
        with pytest.raises(RuntimeError):
            step(bench)
    step(bench)
    assert [event["eventType"] for event in catalog] == ["START", "FAIL", "START", "COMPLETE"]
    assert len({event["run"]["runId"] for event in catalog}) == 1
    message = catalog[1]["run"]["facets"]["errorMessage"]["message"]
    assert "no room at postgresql://me@db/x" in message
    assert "hunter2" not in json.dumps(catalog)


def test_a_catalog_that_is_away_keeps_no_step_from_going_on(bench, monkeypatch, caplog):
    monkeypatch.setenv("OPENLINEAGE_URL", "http://me:hunter2@127.0.0.1:9")
    bench.commit("code", 0)
    assert run_module.run_step(bench.project, "code", None, plain_tasks()) is not None
    assert "was not told" in caplog.text
    assert "hunter2" not in "".join(record.getMessage() for record in caplog.records if record.name.startswith("flows"))
