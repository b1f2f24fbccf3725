"""States and checkpoints that somebody damaged or altered: a typed error in one line, in bounded time and memory."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path

import pytest
import torch

from copal.bounded import check_bounds, parse_json, read_json
from copal.checkpoint import Checkpoint
from copal.config import CalibrationConfig, PruneConfig
from copal.errors import CopalError, ModelError, StateError
from copal.report import read_report
from copal.state import StateReader
from copal.step import Base, NewDomain, prune_step
from support.damage import FEW_AND_MANY, MemoryBound, altered, damaged, survives
from support.windows import dialect


@pytest.fixture(scope="module")
def stepped(make_model, tmp_path_factory) -> Path:
    """What a step wrote."""
    out = tmp_path_factory.mktemp("stepped") / "out"
    domain = NewDomain(name="code", md5="1", weight=1.0, windows=dialect(0))
    prune_step(
        Base(folder=make_model(), fingerprint="base"), None, domain, out,
        calibration=CalibrationConfig(), prune=PruneConfig(iterations=2), device=torch.device("cpu"),
        dtype=torch.float32,
    )  # fmt: skip
    return out


def read_state(state: Path) -> None:
    reader = StateReader(state)
    reader.manifest.require(base="base", statistics=reader.manifest.statistics, criterion="loss", where=state)
    for block in range(2):
        reader.sum(block, torch.device("cpu"))


@FEW_AND_MANY
@pytest.mark.parametrize("file", ["state/manifest.json", "report.json"])
def test_an_altered_manifest_or_report_is_read_or_refused(stepped, count, file):
    path, drawn = stepped / file, random.Random(1)
    whole = path.read_bytes()
    value, refused = json.loads(whole), 0
    try:
        with MemoryBound():
            for number in range(count):
                content = damaged(whole, drawn) if number % 2 else json.dumps(altered(value, drawn)).encode()
                path.write_bytes(content)
                refused += bool(survives(partial(read_report, stepped), StateError))
    finally:
        path.write_bytes(whole)
    assert count // 4 < refused < count


@FEW_AND_MANY
def test_a_damaged_shard_of_a_state_is_refused(stepped, count):
    path, drawn = next((stepped / "state/sum").glob("block-00000*")), random.Random(2)
    whole = path.read_bytes()
    try:
        with MemoryBound():
            for _ in range(count):
                content = damaged(whole, drawn)
                path.write_bytes(content)
                assert survives(partial(read_state, stepped / "state"), StateError) or content == whole
    finally:
        path.write_bytes(whole)


def read_some(folder: Path) -> None:
    found = Checkpoint(folder)
    found.read(found.names()[:3])


@FEW_AND_MANY
def test_an_altered_header_of_safetensors_is_read_or_refused(make_model, tmp_path, count):
    whole = (make_model() / "model.safetensors").read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header, rest, drawn, refused = json.loads(whole[8 : 8 + size]), whole[8 + size :], random.Random(3), 0
    path = tmp_path / "model.safetensors"
    with MemoryBound():
        for number in range(count):
            if number % 2:
                content = damaged(whole[: 8 + size], drawn) + rest
            else:
                made = json.dumps(altered(header, drawn)).encode()
                content = len(made).to_bytes(8, "little") + made + rest
            path.write_bytes(content)
            refused += bool(survives(partial(read_some, tmp_path), ModelError))
    assert refused > count // 2


@pytest.mark.quick
@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"[" * 100_000 + b"]" * 100_000, "nested too deep"),
        (b"[" * 65 + b"]" * 65, "nested too deep"),
        (b"1" * 10_000, "not JSON"),
        (b"[NaN]", "NaN is no number"),
        (b"\xff", "not JSON"),
        (b"", "not JSON"),
    ],
)
def test_json_beyond_its_bounds_is_refused(data, says):
    assert says in survives(lambda: parse_json(data, "here", CopalError))


@pytest.mark.quick
def test_a_file_of_more_than_32_mb_is_not_read(tmp_path):
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(40 << 20)
    with MemoryBound():
        assert "larger than 32 MB" in survives(lambda: read_json(tmp_path / "large.json", CopalError))


@pytest.mark.quick
def test_parts_that_name_one_another_many_times_count_each_time():
    value = ["ha"]
    for _ in range(40):
        value = [value] * 10
    assert "more than" in survives(lambda: check_bounds(value, "here", CopalError))
