"""One holder of a lineage at a time, whoever races for it, and nothing from one that came too late."""

from __future__ import annotations

import os
import signal
import threading
from multiprocessing import get_context

import psutil
import pytest

from flows.data.git import git
from flows.project import hold_lineage
from support.benches import Bench
from support.crashes import Point, process, start, watch_rounds
from support.toys import holder


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.team)])
def raced(request: pytest.FixtureRequest, bench: Bench) -> Bench:
    """A workspace with its ledger on either database."""
    if request.param == "postgresql":
        server = request.getfixturevalue("postgresql")
        uri = server.uri(server.new_database())
        bench.set("model: {name: tiny", f"ledger: {{uri: '{uri}'}}\nmodel: {{name: tiny")
    return bench


def test_a_holder_whose_process_is_dead_is_not_waited_for(bench):
    bench.commit("code", 0)
    child = start(bench.root, "code", "HEAD", Point("flows.ledger.claims:take", "after"))
    child.join()
    assert child.exitcode == -signal.SIGKILL
    found = holder(bench.project)
    assert (found["held"], found["pid"]) == (1, child.pid)
    with hold_lineage(bench.project, "next"):
        pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("watchers", "rounds"),
    [(2, 4), (8, 2), *(pytest.param(watchers, 20, marks=pytest.mark.soak) for watchers in (2, 8))],
)
def test_watchers_on_the_same_data_make_one_version_a_key(raced, watchers, rounds):
    raced.commit("legal", 0)
    revs = [raced.commit("code", 1), raced.commit("code", 2)]
    raced.set("model: {name: tiny", "watch: {branch: watched}\nmodel: {name: tiny")
    barrier = get_context("forkserver").Barrier(watchers + 1)
    processes = [process(watch_rounds, str(raced.root), barrier, rounds) for _ in range(watchers)]
    for number in range(rounds):
        git(raced.root, "branch", "--force", "watched", revs[number % 2])
        barrier.wait(timeout=300)
        barrier.wait(timeout=300)
    for child in processes:
        child.join()
    assert [child.exitcode for child in processes] == [0] * watchers
    versions = raced.registry.versions()
    assert [version.tags.get("copal.domain") for version in versions] == [None, "legal", *["code"] * rounds]
    assert [version.parent for version in versions] == [None, *(version.number for version in versions[:-1])]
    assert [version.number for version in versions] == list(range(1, rounds + 3))  # nobody's was withdrawn
    figures = {
        (domain.evaluation_digest, record.dense_perplexity[domain.name])
        for record in map(raced.registry.record, versions)
        for domain in record.domains
    }
    assert len(figures) == 3  # one of legal and one of each data of code, whoever measured it or handed it on


@pytest.mark.parametrize(
    "point",
    [
        Point("copal.state:StateWriter.sum", "after", signal=signal.SIGSTOP),
        Point("flows.ledger.claims:Claim.seal", "before", signal=signal.SIGSTOP),
        Point("mlflow:MlflowClient.create_model_version", "before", signal=signal.SIGSTOP),
    ],
    ids=str,
)
def test_a_worker_that_was_paused_past_its_expiry_publishes_nothing(raced, point):
    raced.commit("code", 0)
    raced.set("model: {name: tiny", "run: {lease: 4}\nmodel: {name: tiny")
    late = start(raced.root, "code", "HEAD", point)
    pause = threading.Event()
    while psutil.Process(late.pid).status() != psutil.STATUS_STOPPED:
        pause.wait(0.05)

    following = start(raced.root, "code", "HEAD")
    following.join()
    assert following.exitcode == 0
    published = raced.registry.versions()
    assert [version.tags.get("copal.domain") for version in published] == [None, "code"]

    os.kill(late.pid, signal.SIGCONT)
    late.join()
    assert late.exitcode == 1
    assert raced.registry.versions() == published
