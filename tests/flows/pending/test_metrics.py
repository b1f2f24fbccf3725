"""Figures for Prometheus: of what waits, of who works, of the newest version; and of a store that is away."""

from __future__ import annotations

import shutil
import urllib.request

from prometheus_client import start_http_server
from prometheus_client.parser import text_string_to_metric_families

from flows.data.git import git
from flows.pending.metrics import exposition, registry_of
from flows.project import hold_lineage
from support.toys import step


def figures(text: str) -> dict[tuple[str, ...], float]:
    """(name, domain or stage, if any) -> value."""
    return {
        (sample.name, *(value for name, value in sample.labels.items() if name != "model")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_the_figures_are_those_of_the_lineage(bench):
    bench.commit("code", 0)
    waits = figures(exposition(str(bench.root)))
    assert waits["copal_up",] == 1
    assert waits["copal_pending_datasets",] == 1
    assert waits["copal_version",] == 1
    made = step(bench)
    git(bench.root, "commit", "--quiet", "--allow-empty", "--message", "Later")
    done = figures(exposition(str(bench.root)))
    assert (done["copal_pending_datasets",], done["copal_oldest_pending_seconds",]) == (0, 0)
    assert done["copal_version",] == made.number
    record = bench.registry.record(made.version)
    assert done["copal_perplexity", "code"] == record.perplexity["code"]
    assert done["copal_step_seconds", "solve"] == record.seconds.solve
    assert done["copal_gates_failed",] == float(bench.registry.head().gates == "failed")
    assert done["copal_lease_held",] == 0
    with hold_lineage(bench.project, "a test"):
        held = figures(exposition(str(bench.root)))
    assert held["copal_lease_held",] == 1
    assert 0 < held["copal_lease_left_seconds",] <= bench.settings.run.lease


def test_the_age_is_that_of_the_oldest_commit(bench, monkeypatch):
    for variable in ("GIT_COMMITTER_DATE", "GIT_AUTHOR_DATE"):
        monkeypatch.setenv(variable, "2026-01-01T00:00:00Z")
    bench.commit("code", 0)
    monkeypatch.undo()
    bench.commit("legal", 1)
    assert figures(exposition(str(bench.root)))["copal_oldest_pending_seconds",] > 300 * 24 * 3600


def test_a_store_that_is_away_is_a_figure_and_comes_back(bench):
    server, thread = start_http_server(0, "127.0.0.1", registry_of(str(bench.root)))
    try:

        def scraped() -> dict[tuple[str, ...], float]:
            with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics") as answer:
                return figures(answer.read().decode())

        assert scraped()["copal_up",] == 1
        database = bench.root / ".copal" / "mlflow.db"
        shutil.copy(database, bench.root / "kept")
        database.write_text("no database")
        assert scraped()["copal_up",] == 0
        shutil.copy(bench.root / "kept", database)
        assert scraped()["copal_up",] == 1
    finally:
        server.shutdown()
        thread.join()
