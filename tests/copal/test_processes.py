from __future__ import annotations

import pytest
import torch

from support import in_processes

pytestmark = pytest.mark.slow


@pytest.fixture
def domains(make_windows) -> dict[str, torch.Tensor]:
    return {"code": make_windows(0, windows=7), "legal": make_windows(1, windows=8)}


def test_two_processes_give_what_one_gives(make_model, domains, tmp_path, cpu):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    base = make_model()
    in_processes.run(base, domains, one, cpu)
    in_processes.launch(base, domains, two, environment={"CUDA_VISIBLE_DEVICES": ""})
    in_processes.same(one, two)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_give_what_one_gives(make_model, domains, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    base = make_model()
    in_processes.run(base, domains, one, torch.device("cuda"))
    in_processes.launch(base, domains, two)
    in_processes.same(one, two)
