"""A step that was killed goes on from its last whole block, to the same bits."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from copal import walk
from copal.config import PruneConfig
from copal.errors import NumericsError, StateError
from copal.estimate import estimate_step
from copal.progress import Progress, silent
from copal.resume import Unfinished
from copal.shapes import StepSettings
from copal.step import NewDomain, StepReport, WithdrawnDomain, prune_step
from copal.streaming import StreamedModel
from support.versions import CALIBRATION, Lineage
from support.windows import dialect

QUICK = PruneConfig(criterion="loss", rounds=(0.8, 1.0), iterations=2)
BLOCKS = 3


class KilledError(BaseException):
    """Raised in place of a kill: nothing of copal handles it."""


class Steps:
    """Steps of a toy that can be killed, and what they compute."""

    def __init__(self, parents: Lineage, folder: Path, windows: torch.Tensor) -> None:
        self.base, self.parent, self.folder = parents.base, parents.parent, folder
        self.domain: NewDomain | WithdrawnDomain = NewDomain(name="new", md5="1", windows=windows)
        self.prune = QUICK
        self.computed: Counter[str] = Counter()

    @property
    def boundaries(self) -> int:
        """Blocks, each as often as it is walked over."""
        ways = 1 if isinstance(self.domain, WithdrawnDomain) else 2
        return BLOCKS * (1 + (ways if self.prune.criterion == "loss" else 0))

    @property
    def kept(self) -> Path:
        return self.folder / "kept"

    def run(self, name: str, resume: bool = True, kill_at: int = 0, also: Progress = silent) -> StepReport:
        """A step to the folder `name`; it dies at the nth boundary of a block, those of both ways first."""
        before = {"statistics": 0, "prune": self.boundaries - BLOCKS}

        def progress(stage: str, done: int, total: int) -> None:
            also(stage, done, total)
            if before[stage] + done == kill_at:
                raise KilledError

        return prune_step(
            self.base, self.parent, self.domain, self.folder / name, calibration=CALIBRATION, prune=self.prune,
            device=torch.device("cpu"), dtype=torch.float32, batch=3, resume=self.kept if resume else None,
            progress=progress,
        )  # fmt: skip

    def killed(self, at: int, **more: object) -> None:
        with pytest.raises(KilledError):
            self.run("killed", kill_at=at, **more)

    def files(self, name: str) -> dict[str, bytes]:
        """All that a step wrote but its report, which has seconds in it."""
        folder = self.folder / name
        return {
            str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file() and path.name != "report.json"
        }


@pytest.fixture(scope="module")
def parents(make_model, tmp_path_factory) -> Lineage:
    """A version that knows two domains."""
    lineage = Lineage(make_model(blocks=BLOCKS), tmp_path_factory.mktemp("parents"), QUICK)
    lineage.add("old", dialect(1))
    lineage.add("other", dialect(2))
    return lineage


@pytest.fixture
def steps(parents, tmp_path, monkeypatch) -> Steps:
    """A third domain, of 8 windows in batches of 3; `computed` counts the blocks that ran, and the solves."""
    made = Steps(parents, tmp_path, dialect(0))
    monkeypatch.setattr(StreamedModel, "block", counted(StreamedModel.block, "block", made.computed))
    for name in ("_solve", "_compare"):
        monkeypatch.setattr(walk, name, counted(getattr(walk, name), name, made.computed))
    return made


def only(folder: Path) -> Path:
    (found,) = folder.iterdir()
    return found


def counted(call: Callable, name: str, counts: Counter[str]) -> Callable:
    def counting(*args, **kwargs):
        counts[name] += 1
        return call(*args, **kwargs)

    return counting


CASES = {
    "loss": {},
    "output": {"criterion": "output"},
    "gradient": {"criterion": "gradient"},
    "pattern": {"sparsity": "2:4"},
    "withdrawal": {},
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_killed_after_every_block_ends_with_the_same_bits_and_does_nothing_twice(steps, case):
    steps.prune = replace(QUICK, **CASES[case])
    if steps.prune.criterion != "loss":
        steps.parent = None
    if case == "withdrawal":
        steps.domain = WithdrawnDomain(name="old")
    undisturbed = steps.run("undisturbed", resume=False)
    once = Counter(steps.computed)
    steps.computed.clear()

    for boundary in range(1, steps.boundaries + 1):
        steps.killed(at=boundary)
    report = steps.run("resumed")

    assert steps.computed == once
    assert steps.files("resumed") == steps.files("undisturbed")
    assert replace(report, seconds={}) == replace(undisturbed, seconds={})
    assert not steps.kept.exists()
    assert not (steps.folder / "killed").exists()


@pytest.mark.parametrize("criterion", ["loss", "output"])
def test_a_block_that_is_half_there_counts_for_nothing(steps, monkeypatch, criterion):
    """The disk is full when a block is computed and written, and nothing says yet that it is: at each block in turn."""
    steps.prune, steps.parent = replace(QUICK, criterion=criterion), None
    steps.run("undisturbed", resume=False)
    real, failures = Unfinished.finish, 0
    for attempt in range(4 * steps.boundaries):
        calls = iter([*[False] * (1 + attempt % 2), True])

        def finish(*args, calls=calls, **kwargs):
            if next(calls, False):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(Unfinished, "finish", finish)
            try:
                steps.run("resumed")
                break
            except OSError:
                failures += 1
    assert failures > 1
    assert steps.files("resumed") == steps.files("undisturbed")


OTHERS = {
    "windows": lambda steps, windows: setattr(steps, "domain", replace(steps.domain, windows=windows)),
    "weight": lambda steps, _: setattr(steps, "domain", replace(steps.domain, weight=2.0)),
    "settings": lambda steps, _: setattr(steps, "prune", replace(steps.prune, iterations=3)),
    "parent": lambda steps, _: setattr(steps, "parent", None),
    "base": lambda steps, _: (
        setattr(steps, "base", replace(steps.base, fingerprint="2")),
        setattr(steps, "parent", None),
    ),
    "copal": lambda steps, _: None,
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_another_step_has_finished_is_not_used(steps, monkeypatch, what):
    steps.parent = steps.parent if what == "parent" else None
    steps.killed(at=steps.boundaries - 1)
    OTHERS[what](steps, dialect(7))
    if what == "copal":
        monkeypatch.setattr("copal.step.installed_version", lambda _: "0.0.1")
    steps.computed.clear()
    steps.run("undisturbed", resume=False)
    once = Counter(steps.computed)
    steps.run("resumed")
    assert steps.computed - once == once
    assert steps.files("resumed") == steps.files("undisturbed")


@pytest.mark.parametrize("damage", ["torn", "altered"])
def test_a_damaged_file_is_not_used_and_the_step_begins_anew(steps, damage):
    """A shard of the version whose size is right is only looked at where it is read again."""
    steps.parent = None
    steps.run("undisturbed", resume=False)
    once = Counter(steps.computed)
    steps.killed(at=BLOCKS + 1)
    image = steps.folder / "image"
    only(steps.kept).rename(image)
    parts = [path.relative_to(image) for path in sorted(image.rglob("*.safetensors"))]
    one_of_its_kind = {re.sub(r"(-\d{5}|\.).*", "", str(path)): path for path in parts}
    assert len(one_of_its_kind) == 8, one_of_its_kind
    for part in one_of_its_kind.values():
        if damage == "altered" and "version" in part.parts:
            continue
        damaged = steps.kept / "kept" / part
        shutil.copytree(image, steps.kept / "kept")
        data = bytearray(damaged.read_bytes())
        data[-1] ^= 1
        damaged.write_bytes(data[: len(data) // 2] if damage == "torn" else data)
        steps.computed.clear()
        steps.run("resumed")
        assert steps.computed == once, part
        assert steps.files("resumed") == steps.files("undisturbed")
        shutil.rmtree(steps.folder / "resumed")


def test_a_shard_of_the_state_that_was_altered_is_refused_when_it_is_read_again_and_then_all_begins_anew(steps):
    steps.run("undisturbed", resume=False)
    steps.killed(at=steps.boundaries - 1)
    shard = only(steps.kept) / "version" / "state" / "sum" / f"block-{BLOCKS - 1:05d}.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(StateError, match="which a killed step left, is damaged: the step begins anew"):
        steps.run("resumed")
    assert not any(steps.kept.iterdir())
    steps.run("resumed")
    assert steps.files("resumed") == steps.files("undisturbed")


def test_a_part_that_somebody_removed_is_missed_and_then_all_begins_anew(steps):
    steps.run("undisturbed", resume=False)
    steps.killed(at=2)
    (part,) = steps.kept.glob("*/process-0/hidden-00002.*")
    part.unlink()
    with pytest.raises(StateError, match="has no hidden-00002 any more: the step begins anew"):
        steps.run("resumed")
    steps.run("resumed")
    assert steps.files("resumed") == steps.files("undisturbed")


def test_numbers_that_are_not_finite_leave_nothing_to_go_on_from(steps):
    """What led to them is the same each time: nobody would ever come past it."""
    file = steps.base.folder / "model.safetensors"
    tensors, whole = load_file(file), file.read_bytes()
    tensors[f"model.layers.{BLOCKS - 1}.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    try:
        with pytest.raises(NumericsError, match="down_proj"):
            steps.run("killed")
    finally:
        file.write_bytes(whole)
    assert not any(steps.kept.iterdir())


def test_a_step_that_wakes_up_when_another_run_has_taken_over_finds_nothing_to_write_to(steps):
    steps.run("undisturbed", resume=False)

    def take_over(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("statistics", 2):
            steps.killed(at=4)

    with pytest.raises(FileNotFoundError):
        steps.run("late", also=take_over)
    steps.run("resumed")
    assert steps.files("resumed") == steps.files("undisturbed")


@pytest.mark.parametrize("criterion", ["loss", "output"])
def test_what_is_kept_takes_no_more_of_the_disk_than_was_computed(steps, criterion):
    steps.prune, steps.parent = replace(QUICK, criterion=criterion), None
    most, real = 0, Unfinished.write

    def written(*args, **kwargs):
        nonlocal most
        real(*args, **kwargs)
        files = [path for path in steps.kept.glob("*/process-0/*") if path.name.startswith(("hidden", "gradient"))]
        most = max(most, sum(tensor.nbytes for path in files for tensor in load_file(path).values()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Unfinished, "write", written)
        steps.run("done")
    settings = StepSettings(
        calibration=CALIBRATION, prune=steps.prune, domains=1, dtype=torch.float32, batch=3, resumes=True
    )
    disk = estimate_step(steps.base.folder, settings).disk
    assert most == disk.hidden + disk.newest
