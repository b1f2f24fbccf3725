"""A step that would not fit is refused before anything is fetched or begun, with the figures."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest

from copal.errors import ResourceError
from flows.machine import free_memory
from flows.step import resources, run
from flows.step.resources import check_resources, config_of_base, demands
from flows.step.run import plain_tasks, run_withdrawal
from support.toys import step

ON_DISK = r"about 0\.\d MB of disk in \S+/\.copal, a twentieth to spare included, and 0\.1 MB are free: free some"


def little(kind: str, monkeypatch) -> None:
    """From now on 100 kB are free of it."""
    if kind == "disk":
        monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=100_000))
    else:
        monkeypatch.setattr(resources, {"memory": "free_memory", "gpu": "free_device_memory"}[kind], lambda *_: 100_000)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("disk", ON_DISK),
        ("memory", r"about 1\.\d MB of memory, a fifth to spare included, and 0\.1 MB are free: lower model\.batch"),
        (
            "gpu",
            r"of GPU memory \(with one window at a time\), a fifth to spare included, and 0\.1 MB are free: take",
        ),
    ],
)
def test_a_step_that_does_not_fit_is_refused_with_the_figures_and_nothing_is_fetched(bench, monkeypatch, kind, said):
    bench.commit("code", 0)
    before = bench.snapshot()
    if kind == "gpu":
        monkeypatch.setattr(resources, "settings_of_step", on_gpu(resources.settings_of_step))
    little(kind, monkeypatch)
    monkeypatch.setattr(run, "fetch_data", lambda *_: pytest.fail("data was fetched"))
    with pytest.raises(ResourceError, match=said) as refused:
        step(bench)
    assert "run.check_resources: false" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert bench.snapshot() == before
    assert bench.registry.head().number == 1
    assert not list(bench.workspace.runs.glob("*"))


def on_gpu(settings_of_step):
    from dataclasses import replace

    return lambda *arguments: replace(settings_of_step(*arguments), on_gpu=True)


def test_a_user_may_know_better(bench, monkeypatch):
    bench.commit("code", 0)
    little("disk", monkeypatch)
    with bench.workspace.params.open("a") as file:
        file.write("run: {check_resources: false}\n")
    assert step(bench).number == 2


def test_what_is_staged_is_not_asked_again_whether_it_fits(bench, monkeypatch):
    bench.commit("code", 0)
    with monkeypatch.context() as patch:
        patch.setattr(run, "evaluate_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            step(bench)
    little("memory", monkeypatch)
    assert step(bench).number == 2


def test_what_a_killed_step_has_on_the_disk_already_need_not_be_free(bench, monkeypatch):
    bench.commit("code", 0)
    asked = []
    monkeypatch.setattr(run, "check_resources", lambda project, domains, begun: asked.append(begun))

    def ends(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.run_step(bench.project, "code", None, plain_tasks(ends))
    (unfinished,) = bench.workspace.runs.glob("*/unfinished")
    there = sum(path.stat().st_size for path in unfinished.rglob("*") if path.is_file())
    assert step(bench).number == 2
    assert asked == [0, there]
    with config_of_base(bench.registry) as folder:
        needed = [demands(bench.project, folder, 1, begun=begun)[0].needed for begun in (0, there, 10**12)]
    assert needed[0] - needed[1] == there > 100_000
    assert needed[2] == 0


def test_a_withdrawal_has_to_fit_too(bench, monkeypatch):
    for seed, domain in enumerate(("code", "legal")):
        bench.commit(domain, seed)
        step(bench, domain)
    with monkeypatch.context() as patch:
        little("disk", patch)
        with pytest.raises(ResourceError, match=ON_DISK):
            run_withdrawal(bench.project, "code", "licence", plain_tasks())
    assert run_withdrawal(bench.project, "code", "licence", plain_tasks()).made.number == 4


def test_of_a_base_on_another_machine_only_the_configuration_is_fetched(bench, monkeypatch):
    monkeypatch.setattr("flows.registry.artifacts.local_path", lambda uri: None)  # as if it were there
    with config_of_base(bench.registry) as folder:
        assert [path.name for path in folder.iterdir()] == ["config.json"]
        memory = {one.kind: one.needed for one in demands(bench.project, folder, 1)}["memory"]
    little("memory", monkeypatch)
    with pytest.raises(ResourceError):
        check_resources(bench.project, 1)
    assert memory > 100_000
    assert not list((bench.workspace.cache / "registry").glob("tiny/*-*"))


def test_what_is_needed_grows_with_the_margin_and_with_processes(bench):
    def needed(project) -> dict[str, int]:
        with config_of_base(project.registry) as folder:
            return {one.kind: one.needed for one in demands(project, folder, 1)}

    one = needed(bench.project)
    bench.set("dtype: float32", "dtype: float32, processes: 2")
    two = needed(bench.project)
    assert two["disk"] == one["disk"]
    assert two["memory"] > 2 * 600 * 10**6, "Python and its libraries, once more in each"


def test_the_limit_of_a_container_counts_and_what_it_may_give_back(tmp_path):
    free = free_memory(tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("900000\n")
    (tmp_path / "memory.stat").write_text("anon 100000\ninactive_file 300000\n")
    assert abs(free_memory(tmp_path) - free) < 2e9, "no limit"
    (tmp_path / "memory.max").write_text("1000000\n")
    assert free_memory(tmp_path) == 400_000
    (tmp_path / "memory.current").write_text("1500000\n")
    assert free_memory(tmp_path) == 0
