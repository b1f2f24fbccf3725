"""A task of a step in several processes: what comes back is what one process gives, errors and progress too."""

from __future__ import annotations

import errno
import json
import math

import pytest

from copal.errors import CopalError, ModelError, NumericsError, ResourceError, SettingsError, SmallerBatchWarning
from copal.progress import silent
from flows.adapt import adapt
from flows.settings import ModelSettings, Settings
from flows.step import distributed as worker
from flows.step import launch

TWO = Settings(model=ModelSettings(processes=2, dtype="float32"))


@pytest.mark.usefixtures("prefect")
def test_a_step_in_two_processes_registers_what_one_registers(bench):
    bench.commit("code", 0)
    params = bench.workspace.params.read_text()
    records = []
    for processes in (1, 2):
        model = f"name: tiny-{processes}, processes: {processes}"
        bench.workspace.params.write_text(params.replace("name: tiny", model))
        bench.register_root()
        assert adapt(str(bench.root), "code") == 2
        records.append(bench.registry.record(bench.registry.head()))
    one, two = records
    for theirs, ours in ((two.perplexity, one.perplexity), (two.dense_perplexity, one.dense_perplexity)):
        assert math.log(theirs["code"]) == pytest.approx(math.log(ours["code"]), rel=1e-3)
    assert two.sparsity == one.sparsity
    assert two.settings_fingerprint == one.settings_fingerprint
    assert two.settings["model"]["processes"] == 2
    assert two.step == one.step
    assert [layer.name for layer in two.layers] == [layer.name for layer in one.layers]
    assert two.files.keys() == one.files.keys()
    assert not list(bench.workspace.runs.iterdir())


def test_progress_and_an_error_of_the_processes_reach_the_caller(tiny_base, make_windows, tmp_path):
    heard = []
    jobs = [(tiny_base, ["code"]), (tmp_path / "nowhere", ["code"])]
    with pytest.raises(ModelError, match=r"nowhere is not a Hugging Face model folder"):
        worker.evaluate_in_processes(
            tmp_path / "run", TWO, jobs, {"code": make_windows(0)}, lambda *told: heard.append(told)
        )
    assert heard == [("evaluate", done, 3) for done in (1, 2, 3)]  # of the first job; one process tells


def test_a_warning_of_the_processes_reaches_the_caller(capsys):
    with pytest.warns(SmallerBatchWarning, match="memory ran out"):
        launch._listen(['warning "memory ran out"\n', "a library's line\n"], silent)
    assert capsys.readouterr().err == "a library's line\n"


@pytest.mark.parametrize(
    ("kind", "arguments", "error"),
    [
        ("NumericsError", ["model.layers.0"], NumericsError),
        ("OSError", [errno.ENOSPC, "No space left on device", "/out"], OSError),
    ],
)
def test_an_error_comes_back_as_what_it_was(tmp_path, kind, arguments, error):
    file = tmp_path / "error-1.json"
    file.write_text(json.dumps({"kind": kind, "arguments": arguments}))
    with pytest.raises(error) as caught:
        launch.raise_fault(launch._fault([file], ""))
    assert list(caught.value.args) == arguments[:2]


def test_a_process_that_the_system_killed_is_no_bug_and_another_death_is_one():
    with pytest.raises(ResourceError, match=r"model\.processes"):
        launch.raise_fault(launch._fault([], "rank : 1 (local_rank: 1)\n exitcode  : -9 (pid: 4498)\n"))
    with pytest.raises(RuntimeError, match="ZeroDivisionError") as caught:
        launch.raise_fault(launch._fault([], "ZeroDivisionError\n exitcode  : 1 (pid: 4498)\n"))
    assert not isinstance(caught.value, CopalError)


def test_more_processes_than_gpus_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    three = Settings(model=ModelSettings(processes=3, dtype="float32"))
    with pytest.raises(SettingsError, match=r"model\.processes is 3.* 2 GPUs"):
        worker.evaluate_in_processes(tmp_path / "run", three, [], {}, silent)
    assert not list(tmp_path.iterdir())
