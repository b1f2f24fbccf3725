"""One holder of a lineage at a time, whoever races for it, and nothing from one that came too late."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context

import psutil
import pytest
from crashes import Point, process, start, watch_rounds
from toys import last_claim

from flows.data.git import git
from flows.registry.claims import ClaimLostError, claimed
from flows.registry.registry import Registry


@pytest.fixture
def registry(bench) -> Registry:
    return bench.registry


def test_one_after_another_of_eight_through_the_server_holds_the_lineage(mlflow_server, tmp_path):
    """40 times the lineage is taken; tokens rise, and never do two hold it at once."""
    at_once, tokens, lock = [0, 0], [], threading.Lock()
    barrier = threading.Barrier(8)

    def work(number: int) -> None:
        registry = Registry(mlflow_server.uri, tmp_path / "artifacts", "raced", tmp_path / "cache")
        barrier.wait()
        for _ in range(5):
            with claimed(registry, f"worker {number}", lease=30) as claim:
                with lock:
                    at_once[0] += 1
                    at_once[1] = max(at_once)
                    tokens.append(claim.token)
                claim.check()
                with lock:
                    at_once[0] -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert at_once == [0, 1]
    assert len(tokens) == 40
    assert tokens == sorted(set(tokens))


def test_of_eight_that_append_the_same_number_through_the_server_one_gets_it(mlflow_server, tmp_path):
    """The race itself: the name that a number is made of is unique in the database."""
    barrier = threading.Barrier(8)

    def append(number: int) -> list[bool]:
        registry = Registry(mlflow_server.uri, tmp_path / "artifacts", "appended", tmp_path / "cache")
        won = []
        for entry in range(1, 21):
            barrier.wait()
            won.append(registry.add_entry("claim", entry, {"nonce": str(number)}))
        return won

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(append, range(8)))
    assert [sum(of_one) for of_one in zip(*won, strict=True)] == [1] * 20


def test_a_claim_past_its_expiry_is_taken_over_and_its_late_holder_notices(registry):
    with contextlib.suppress(ClaimLostError), claimed(registry, "late", lease=60) as late:
        registry.change_entry("claim", late.token, {"expires": "0"})
        with claimed(registry, "next", lease=60) as following:
            assert following.token == late.token + 1
            with pytest.raises(ClaimLostError):
                late.seal("m-late")
            following.seal("m-next")
        with pytest.raises(ClaimLostError):
            late.check()


def test_a_holder_whose_process_is_dead_is_not_waited_for(bench, registry):
    bench.commit("code", 0)
    taken = Point("mlflow:MlflowClient.create_registered_model", "after", of=".claim-")
    child = start(bench.root, "code", "HEAD", taken)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    entry = last_claim(registry)
    assert (entry["held"], entry["pid"]) == ("yes", str(child.pid))
    with claimed(registry, "next", lease=60):
        pass


def test_a_claim_outlives_its_expiry_as_long_as_its_holder_lives(registry):
    with claimed(registry, "long", lease=4) as claim:
        first = float(registry.entries("claim")[claim.token]["expires"])
        renewed = threading.Event()
        while float(registry.entries("claim")[claim.token]["expires"]) <= first + 4:
            renewed.wait(0.05)
        claim.check()


def test_the_log_of_claims_does_not_grow(registry):
    for _ in range(5):
        with claimed(registry, "work", lease=60):
            pass
    assert len(registry.entries("claim")) == 1


@pytest.mark.parametrize("watchers", [2, 8])
def test_watchers_on_the_same_data_make_one_version_a_key(bench, watchers):
    rounds = 20
    bench.commit("legal", 0)
    revs = [bench.commit("code", 1), bench.commit("code", 2)]
    bench.set("model: {name: tiny", "watch: {branch: watched}\nmodel: {name: tiny")
    barrier = get_context("forkserver").Barrier(watchers + 1)
    processes = [process(watch_rounds, str(bench.root), barrier, rounds) for _ in range(watchers)]
    for number in range(rounds):
        git(bench.root, "branch", "--force", "watched", revs[number % 2])
        barrier.wait(timeout=300)
        barrier.wait(timeout=300)
    for child in processes:
        child.join()
    assert [child.exitcode for child in processes] == [0] * watchers
    versions = bench.registry.versions()
    assert [version.tags.get("copal.domain") for version in versions] == [None, "legal", *["code"] * rounds]
    assert [version.parent for version in versions] == [None, *(version.number for version in versions[:-1])]
    assert [version.number for version in versions] == list(range(1, rounds + 3))  # nobody's was withdrawn


@pytest.mark.parametrize(
    "point",
    [
        Point("copal.state:StateWriter.sum", "after", signal=signal.SIGSTOP),
        Point("mlflow:MlflowClient.create_registered_model", "before", 2, ".claim-", signal.SIGSTOP),
        Point("mlflow:MlflowClient.create_model_version", "before", signal=signal.SIGSTOP),
    ],
    ids=str,
)
def test_a_worker_that_was_paused_past_its_expiry_publishes_nothing(bench, point):
    bench.commit("code", 0)
    bench.set("model: {name: tiny", "run: {lease: 4}\nmodel: {name: tiny")
    late = start(bench.root, "code", "HEAD", point)
    pause = threading.Event()
    while psutil.Process(late.pid).status() != psutil.STATUS_STOPPED:
        pause.wait(0.05)

    following = start(bench.root, "code", "HEAD")
    following.join()
    assert following.exitcode == 0
    published = bench.registry.versions()
    assert [version.tags.get("copal.domain") for version in published] == [None, "code"]

    os.kill(late.pid, signal.SIGCONT)
    late.join()
    assert late.exitcode == 1
    assert bench.registry.versions() == published
