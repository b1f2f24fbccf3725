"""kill -9 at every durable boundary of a step, and at any time: what is visible is the state before or the state after.

Below Prefect, on a toy model. Each trial takes the next step of one lineage; the domain's data goes to and fro between
two versions, so that every trial has a step to take and what it must end in is known.
"""

from __future__ import annotations

import itertools
import random
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from mlflow import MlflowClient

from copal.checkpoint import Checkpoint
from flows.lineage.entries import anchor_of
from flows.lineage.record import verify_files
from flows.pending.reconcile import plan
from flows.step.gc import collect
from support.crashes import POINTS, Point, start

Weights = dict[str, torch.Tensor]


class Trials:
    """A lineage, the two data versions that its domain `code` goes between, and the weights that each ends in."""

    def __init__(self, bench) -> None:
        self.bench = bench
        # The weights are random: what a step does to perplexity means nothing.
        gates = "gates: {forgetting: null, champion: null, dense: null, improvement: false, promote: auto}"
        bench.set("model: {name: tiny", f"{gates}\nmodel: {{name: tiny")
        bench.commit("legal", 1)
        self.revs = (bench.commit("code", 2), bench.commit("code", 3))
        self.turn = 0
        self.step("legal", "HEAD")
        self.seconds = 0.0
        self.ends: list[Weights] = []
        for rev in self.revs:
            began = time.monotonic()
            self.step("code", rev)
            self.seconds = time.monotonic() - began
            self.ends.append(self.weights())

    def step(self, domain: str, rev: str, point: Point | None = None) -> int:
        process = start(self.bench.root, domain, rev, point)
        process.join()
        return process.exitcode

    def weights(self) -> Weights:
        checkpoint = Checkpoint(self.bench.registry.folder(self.bench.registry.head()) / "model")
        return checkpoint.read(checkpoint.names())

    def visible(self) -> list[int]:
        """The versions; every one is whole, MLflow's `latest` is the head, and what is pending is the head's affair."""
        registry = self.bench.registry
        versions = registry.versions()
        for version in versions[-2:]:  # the others were looked at when they were new
            record, folder = registry.record(version), registry.folder(version)
            assert verify_files(record, folder, sum_dropped=version.sum_dropped) == []
        client = MlflowClient(tracking_uri=registry.tracking_uri, registry_uri=registry.tracking_uri)
        everything = client.search_model_versions("name = 'tiny'", max_results=1000)
        assert sorted(int(version.version) for version in everything) == [version.number for version in versions]
        assert plan(self.bench.project).head == versions[-1]
        return [version.number for version in versions]

    def trial(self, kill: Point | float) -> bool:
        """One step that is killed, and what must come of it; whether the kill came in time."""
        before = self.visible()
        rev, end = self.revs[self.turn], self.ends[self.turn]
        if isinstance(kill, Point):
            killed = self.step("code", rev, kill) == -9
        else:
            process = start(self.bench.root, "code", rev)
            process.join(kill)
            process.kill()
            process.join()
            killed = process.exitcode == -9

        after = self.visible()
        assert after[:-1] == before or after == before

        assert self.step("code", rev) == 0
        ended = self.visible()
        assert ended[:-1] == before
        found = self.weights()
        assert found.keys() == end.keys()
        assert all(torch.equal(found[name], end[name]) for name in end)
        registry = self.bench.registry
        keys = [version.tags.get("copal.key") for version in registry.versions()]
        assert len(set(keys)) == len(keys)

        self.check_conclusions()
        collect(self.bench.project)
        assert list(self.bench.workspace.runs.iterdir()) == []
        assert self.leftovers() == []
        self.turn = 1 - self.turn
        return killed

    def check_conclusions(self) -> None:
        """Every version went through its gates once, was promoted once, and the aliases are where the log says."""
        registry = self.bench.registry
        made = [version.number for version in registry.versions()[1:]]
        entries = self.bench.log
        for kind in ("gates", "promotion"):
            assert [entry["version"] for entry in entries if entry["kind"] == kind] == made
        assert [version.gates for version in registry.versions()[1:]] == ["passed"] * len(made)
        assert registry.alias("challenger") == registry.alias("champion") == made[-1]
        ledger = self.bench.project.ledger
        assert ledger.settled("champion") == entries[-1]["number"] == ledger.settled("challenger") + 1
        assert registry.log_anchor() == anchor_of(entries)

    def leftovers(self) -> list[str]:
        """What lies in the registry and belongs to no version."""
        registry = self.bench.registry
        client = MlflowClient(tracking_uri=registry.tracking_uri, registry_uri=registry.tracking_uri)
        experiment = client.get_experiment_by_name("tiny").experiment_id
        known = {version.tags["copal.logged_model"] for version in registry.versions()}
        stored = {path.name for path in self.bench.workspace.artifacts.glob("tiny/models/*")}
        models = {model.model_id for model in client.search_logged_models([experiment], max_results=1000)}
        running = client.search_runs([experiment], "attributes.status = 'RUNNING'")
        return sorted((stored | models) - known) + [run.info.run_id for run in running]


Pair = tuple[Trials, Trials]


@pytest.fixture(scope="module")
def lineages(make_bench, tmp_path_factory) -> Iterator[Pair]:
    """Pairs, one after another; each is used for some trials only: versions and log entries make a step slower."""

    def made() -> Trials:
        return Trials(make_bench(tmp_path_factory.mktemp("crash") / "workspace"))

    def endless() -> Iterator[Pair]:
        while True:
            yield from itertools.repeat((made(), made()), 16)

    return endless()


@pytest.fixture
def pair(lineages: Iterator[Pair]) -> Pair:
    """Two lineages, for two trials at a time: a step of this size has work for one core."""
    return next(lineages)


def named(points: tuple[Point, Point | None]) -> str:
    return " and ".join(str(point) for point in points if point is not None)


@pytest.mark.parametrize("points", list(itertools.zip_longest(POINTS[::2], POINTS[1::2])), ids=named)
def test_a_step_killed_at_a_durable_boundary_is_finished_by_the_next(pair: Pair, points: tuple[Point, Point | None]):
    with ThreadPoolExecutor(len(pair)) as pool:
        list(pool.map(at_a_boundary, pair, points))


def at_a_boundary(trials: Trials, point: Point | None) -> None:
    if point is None:
        return
    if "flows.data.fetch" in point.target:
        for path in trials.bench.workspace.cache.glob("*.dir"):
            shutil.rmtree(path)
    assert trials.trial(point), f"the step never came by {point}"


def test_a_step_killed_at_any_time_is_finished_by_the_next(pair: Pair):
    at_any_time(pair, kills=30, seed=0)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_a_step_killed_at_any_time_300_times(pair: Pair):
    at_any_time(pair, kills=300, seed=1)


def at_any_time(pair: Pair, kills: int, seed: int) -> None:
    def run(trials: Trials, moments: random.Random) -> int:
        return sum(trials.trial(moments.uniform(0, trials.seconds)) for _ in range(kills // len(pair)))

    with ThreadPoolExecutor(len(pair)) as pool:
        in_time = sum(pool.map(run, pair, (random.Random(f"{seed}/{place}") for place in range(len(pair)))))
    assert in_time >= kills * 2 // 3
