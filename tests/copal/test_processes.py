from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from support import in_processes

pytestmark = pytest.mark.slow
LAUNCH = (
    "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no "
    "--dynamo_backend no --main_process_port 0"
)


def launch(base: Path, windows: dict[str, torch.Tensor], out: Path, **environment: str) -> None:
    """`in_processes.run` in two processes."""
    save_file(windows, out / "windows.safetensors")
    root = str(Path(__file__).parents[2])
    subprocess.run(
        [sys.executable, *LAUNCH.split(), in_processes.__file__, str(base), str(out / "windows.safetensors"), str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, **environment},
        timeout=300,
        check=True,
    )


def same(one: Path, two: Path) -> None:
    statistics = [load_file(out / "statistics-of-code.safetensors") for out in (one, two)]
    torch.testing.assert_close(*statistics, rtol=1e-5, atol=1e-5)  # G as correlations: 1 is the most there is
    alone, together = (json.loads((out / "found.json").read_text()) for out in (one, two))
    assert (alone["processes"], together["processes"]) == (1, 2)
    for name, (nats, tokens) in alone["scores"].items():
        assert together["scores"][name] == [pytest.approx(nats, rel=1e-5), tokens]
    assert together["back"] == pytest.approx(alone["back"], abs=2)  # all but equal scores may change places
    assert alone["refused"] == ""
    assert together["refused"].startswith("model.processes is 2, but there are 1 windows")
    files = [{str(path.relative_to(out)) for path in out.rglob("*")} for out in (one, two)]
    assert files[1] - files[0] == {"windows.safetensors"}


@pytest.fixture
def domains(make_windows) -> dict[str, torch.Tensor]:
    return {"code": make_windows(0, windows=7), "legal": make_windows(1, windows=8)}


def test_two_processes_give_what_one_gives(make_model, domains, tmp_path, cpu):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    base = make_model()
    in_processes.run(base, domains, one, cpu)
    launch(base, domains, two, CUDA_VISIBLE_DEVICES="")
    same(one, two)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_give_what_one_gives(make_model, domains, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    base = make_model()
    in_processes.run(base, domains, one, torch.device("cuda"))
    launch(base, domains, two)
    same(one, two)
