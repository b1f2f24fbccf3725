"""A model larger than memory: base, parent, state and output pass through it block by block."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from support import larger_than_memory

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc"),
]


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A folder that goes when the test ends: pytest would keep gigabytes for three runs."""
    with TemporaryDirectory(dir=tmp_path) as folder:
        yield Path(folder)


def measure(folder: Path, megabytes: int) -> dict[str, float]:
    program, root = larger_than_memory.__file__, Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(program), str(folder), str(megabytes)],
        env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"},
        stdout=subprocess.PIPE,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout)
    print(found)
    return found


def test_two_steps_and_an_evaluation_take_less_memory_than_half_of_the_model(scratch):
    found = measure(scratch, 400)
    assert found["peak"] - found["bare"] < found["size"] / 2


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_memory_does_not_grow_with_the_number_of_blocks(scratch):
    found = measure(scratch, 3000)
    assert found["size"] >= 3e9
    assert found["peak"] - found["bare"] < 400e6 / 2  # what a model of 400 MB may take
