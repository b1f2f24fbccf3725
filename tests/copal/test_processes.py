from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from copal import processes
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


@pytest.mark.parametrize(("found", "taken"), [("mps", "cpu"), ("xpu:0", "cpu"), ("cpu", "cpu"), ("cuda:1", "cuda:1")])
def test_a_step_runs_on_cuda_or_on_the_cpu(monkeypatch, found, taken):
    monkeypatch.setattr(processes, "_state", lambda: SimpleNamespace(device=torch.device(found)))
    assert processes.device() == torch.device(taken)


@pytest.mark.gpu
@pytest.mark.parametrize(("devices", "backend"), [("0", ("gloo",)), ("0,1", ())])
def test_two_processes_on_one_gpu_or_two_give_what_one_gives(make_model, domains, tmp_path, devices, backend):
    if torch.cuda.device_count() < len(devices.split(",")):
        pytest.skip(f"needs the CUDA devices {devices}")
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    base = make_model()
    in_processes.run(base, domains, one, torch.device("cuda"))
    in_processes.launch(base, domains, two, *backend, environment={"CUDA_VISIBLE_DEVICES": devices})
    in_processes.same(one, two)
