"""kill -9 at every durable boundary of a step, and at any time: what is visible is the state before or the state after.

Below Prefect, on a toy model. One step is recorded: at each point of `support.crashes` the workspace is copied as a
kill would leave it, and the step goes on. Each test puts one of these copies in the place of the workspace (MLflow has
absolute paths), and the next step has to make of it what it would have made without a kill. Real kills at some of the
points hold the copies against the real thing. Neither models a power cut, which loses what nobody flushed.
"""

from __future__ import annotations

import random
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from copal.checkpoint import Checkpoint
from flows.lineage.chain import anchor_of
from flows.lineage.files import verify_files
from flows.pending.plan import plan
from flows.step.gc import collect
from support.benches import copy_workspace
from support.crashes import POINTS, Point, record, start

pytestmark = pytest.mark.slow
Weights = dict[str, torch.Tensor]

# A kill at these is tried for real as well: while data is fetched, pruned, registered, judged and shown.
REAL = [
    Point("flows.data.fetch:fetched_once", "after"),
    Point("copal.state:StateWriter.contribution", "after"),
    Point("copal.resume:Unfinished.finish", "after", of="prune-00000"),
    Point("mlflow:MlflowClient.log_model_artifacts", "after"),
    Point("flows.ledger.claims:Claim.seal", "after"),
    Point("mlflow:MlflowClient.create_model_version", "after"),
    Point("flows.ledger:Ledger.append", "after"),
]


class Trials:
    """A workspace whose next step is a known one, and what a kill in that step leaves.

    The domain `code` has two data versions; the lineage has adapted to both, and the step goes back to the first.
    """

    def __init__(self, bench, images: Path) -> None:
        self.bench, self.images = bench, images
        # The weights are random: what a step does to perplexity means nothing.
        gates = "gates: {forgetting: null, champion: null, dense: null, improvement: false, promote: auto}"
        bench.set("model: {name: tiny", f"{gates}\nmodel: {{name: tiny")
        bench.commit("legal", 1)
        self.rev = bench.commit("code", 2)
        other = bench.commit("code", 3)
        assert self.step("legal", "HEAD") == 0
        assert self.step("code", self.rev) == 0
        self.end = self.weights()
        began = time.monotonic()
        assert self.step("code", other) == 0
        self.seconds = time.monotonic() - began
        for path in bench.workspace.cache.glob("*.dir"):  # the step has to fetch its data
            shutil.rmtree(path)
        self.before = self.visible()
        copy_workspace(bench.root, self.images / "before")
        record(bench.root, "code", self.rev, POINTS, self.images)
        self.check_end()

    def step(self, domain: str, rev: str, point: Point | None = None) -> int:
        process = start(self.bench.root, domain, rev, point)
        process.join()
        return process.exitcode

    def put_back(self, image: str) -> None:
        """The workspace as it was at another time."""
        copy_workspace(self.images / image, self.bench.root)

    def image(self, point: Point) -> str:
        name = str(POINTS.index(point))
        assert (self.images / name).is_dir(), f"the step never came by {point}"
        return name

    def weights(self) -> Weights:
        checkpoint = Checkpoint(self.bench.registry.folder(self.bench.registry.head()) / "model")
        return checkpoint.read(checkpoint.names())

    def visible(self) -> list[int]:
        """The versions; every one is whole, MLflow's `latest` is the head, and what is pending is the head's affair."""
        registry = self.bench.registry
        versions = registry.versions()
        for version in versions:
            record, folder = registry.record(version), registry.folder(version)
            assert verify_files(record, folder, sum_dropped=version.sum_dropped) == []
        client = MlflowClient(tracking_uri=registry.tracking_uri, registry_uri=registry.tracking_uri)
        everything = client.search_model_versions("name = 'tiny'", max_results=1000)
        assert sorted(int(version.version) for version in everything) == [version.number for version in versions]
        assert plan(self.bench.project).head == versions[-1]
        return [version.number for version in versions]

    def recover(self) -> None:
        """What is there after the kill, and what the next step makes of it."""
        after = self.visible()
        assert after[:-1] == self.before or after == self.before
        assert self.step("code", self.rev) == 0
        self.check_end()

    def check_end(self) -> None:
        """The lineage is one version longer, as if nobody had been killed, and nothing else is left."""
        ended = self.visible()
        assert ended[:-1] == self.before
        found = self.weights()
        assert found.keys() == self.end.keys()
        assert all(torch.equal(found[name], self.end[name]) for name in self.end)
        registry = self.bench.registry
        keys = [version.tags.get("copal.key") for version in registry.versions()]
        assert len(set(keys)) == len(keys)

        self.check_conclusions()
        collect(self.bench.project)
        assert list(self.bench.workspace.runs.iterdir()) == []
        assert self.leftovers() == []

    def check_conclusions(self) -> None:
        """Every version went through its gates once, was promoted once, and the aliases are where the log says."""
        registry = self.bench.registry
        made = [version.number for version in registry.versions()[1:]]
        entries = self.bench.log
        for kind in ("gates", "promotion"):
            assert [entry.version for entry in entries if entry.kind == kind] == made
        assert [version.gates for version in registry.versions()[1:]] == ["passed"] * len(made)
        assert registry.alias("challenger") == registry.alias("champion") == made[-1]
        ledger = self.bench.project.ledger
        assert ledger.settled("champion") == entries[-1].number == ledger.settled("challenger") + 1
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


@pytest.fixture(scope="module")
def trials(make_bench, tmp_path_factory, exchanged_files) -> Trials:
    """One recorded step for all tests that a process runs."""
    folder = tmp_path_factory.mktemp("crash")
    return Trials(make_bench(folder / "workspace"), folder / "images")


def in_two_groups(values: Iterable[Any]) -> list[Any]:
    """Parameters for two processes, of which each records a step."""
    return [pytest.param(value, marks=pytest.mark.xdist_group(f"kills {n % 2}")) for n, value in enumerate(values)]


@pytest.mark.parametrize("point", in_two_groups(POINTS), ids=str)
def test_a_step_killed_at_a_durable_boundary_is_finished_by_the_next(trials: Trials, point: Point) -> None:
    trials.put_back(trials.image(point))
    trials.recover()


@pytest.mark.parametrize("point", in_two_groups(REAL), ids=str)
def test_a_real_kill_leaves_what_its_image_has_and_is_finished_by_the_next(trials: Trials, point: Point) -> None:
    trials.put_back("before")
    assert trials.step("code", trials.rev, point) == -9
    assert files(trials.bench.root) == files(trials.images / trials.image(point))
    trials.recover()


def files(root: Path) -> Counter[str]:
    """The files that a step writes, without the ids that each has of its own."""
    names = [path.relative_to(root).as_posix() for path in (root / ".copal").rglob("*") if path.is_file()]
    return Counter(re.sub(r"[0-9a-f]{32}|(?<=partial-)\d+", "ID", name) for name in names)


@pytest.mark.xdist_group("kills 0")
def test_a_step_killed_at_any_time_is_finished_by_the_next(trials: Trials) -> None:
    at_any_time(trials, kills=3, seed=0)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_a_step_killed_at_any_time_300_times(trials: Trials) -> None:
    at_any_time(trials, kills=300, seed=-1)


def at_any_time(trials: Trials, kills: int, seed: int) -> None:
    """Real kills; one that comes when the step is over does not count, and tells how long a step takes now."""
    moments = random.Random(seed)
    in_time = 0
    for _ in range(3 * kills):
        trials.put_back("before")
        began = time.monotonic()
        process = start(trials.bench.root, "code", trials.rev)
        process.join(moments.uniform(0, trials.seconds))
        took = time.monotonic() - began
        process.kill()
        process.join()
        trials.recover()
        if process.exitcode == 0:
            trials.seconds = min(trials.seconds, took)
            continue
        assert process.exitcode == -9
        in_time += 1
        if in_time == kills:
            return
    pytest.fail(f"{in_time} kills of {3 * kills} came in time")
