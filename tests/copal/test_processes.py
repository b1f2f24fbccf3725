from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from copal import processes
from copal.errors import SettingsError
from support import in_processes, sleeping

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


def test_an_evaluation_of_many_domains_fans_out(make_model, tmp_path):
    """Fifty domains with few windows each, on four workers that sleep instead of computing."""
    base, out = make_model(), tmp_path / "seconds"
    alone = (
        sleeping.DOMAINS * sleeping.WINDOWS * 2 * sleeping.SECONDS
    )  # what one worker sleeps, in two blocks, at least
    script, without_gpu = Path(sleeping.__file__), {"CUDA_VISIBLE_DEVICES": ""}
    in_processes.launch_script(script, str(base), str(out), processes=4, environment=without_gpu)
    assert json.loads(out.read_text()) <= 0.35 * alone


@pytest.mark.parametrize("counts", [[5] * 50, [1, 7, 3, 20], [4]])
def test_processes_share_all_domains_evenly_and_keep_windows_together(monkeypatch, counts):
    windows, start = {}, 0
    for number, count in enumerate(counts):
        windows[f"domain-{number}"] = torch.arange(start, start + count).unsqueeze(1)
        start += count
    monkeypatch.setattr(processes, "processes", lambda: 4)
    shares = []
    for number in range(4):
        monkeypatch.setattr(processes, "number", lambda number=number: number)
        shares.append(processes.share_of_domains(windows))
    sizes = [sum(map(len, share.values())) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert sum(len(share) for share in shares) <= len(counts) + 3, "a domain is cut where a process has enough, only"
    assert torch.cat([torch.cat(list(share.values())) for share in shares]).flatten().tolist() == list(range(start))
    with pytest.raises(SettingsError, match=r"4 processes .* cannot share 3 windows"):
        processes.share_of_domains({"few": torch.zeros(3, 1)})


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
