"""A step on a pool of Kubernetes gets a pod of its size."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import WorkPool

from copal.estimate import Disk, Estimate, estimate_step
from copal.known import config_folder
from copal.memory import Memory
from flows import watch
from flows.adapt import adapt
from flows.runs.dispatch import pool_of, start_run
from flows.runs.sizing import PodSize, job_variables, pod_size, pod_variables, settings_of_pod
from flows.settings import ModelSettings, Settings
from flows.stack.team import pool_template
from flows.step.resolve import find_step

TEMPLATE = json.loads((Path(__file__).parents[3] / "infra/kubernetes/base/job-template.json").read_text())
GIB = 1 << 30
sizes = st.integers(min_value=0, max_value=10**14)


def pool(kind: str = "kubernetes", **defaults: object) -> WorkPool:
    return WorkPool(name="copal-gpu", type=kind, base_job_template=pool_template(TEMPLATE, defaults))


@given(model=sizes, contribution=sizes, total=sizes, hidden=sizes, host=sizes, processes=st.integers(1, 64))
def test_a_pod_holds_all_that_its_step_holds(model, contribution, total, hidden, host, processes) -> None:
    disk = Disk(model=model, contribution=contribution, total=total, hidden=hidden, newest=hidden)
    found = Estimate(disk=disk, memory=Memory(host=host, device=0), work={}, files=0)
    size = pod_size(found, processes, on_gpu=True)
    assert size.memory >= host * 1.2 + processes * 2 * GIB - 1
    assert size.disk > disk.most + disk.version + model + disk.version, "its own, what it publishes, base and parent"
    assert size.gpus == processes
    assert pod_size(found, processes, on_gpu=False).gpus == 0
    variables = job_variables(size)
    assert int(str(variables["memory"]).removesuffix("Gi")) * GIB >= size.memory
    assert int(str(variables["scratch"]).removesuffix("Gi")) * GIB >= size.disk


def test_bytes_become_whole_gibibytes() -> None:
    assert job_variables(PodSize(memory=12 * GIB, disk=12 * GIB + 1, gpus=2)) == {
        "memory": "12Gi",
        "scratch": "13Gi",
        "gpus": 2,
        "nodes": 1,
    }


def test_a_well_known_model_gets_what_its_makers_would_expect() -> None:
    """An 8B model on one GPU: the weights are on disk several times, and never in memory whole."""
    with config_folder("llama-3-8b") as folder:
        found = {
            on_gpu: estimate_step(folder, settings_of_pod(Settings(), 3, on_gpu=on_gpu)) for on_gpu in (True, False)
        }
    gpu, cpu = (pod_size(found[on_gpu], 1, on_gpu=on_gpu) for on_gpu in (True, False))
    assert 60 * GIB < gpu.disk < 200 * GIB
    assert 3 * GIB < gpu.memory < 24 * GIB
    assert gpu.memory < cpu.memory < 120 * GIB


@pytest.mark.parametrize(
    ("dtype", "on_gpu", "size"), [("auto", True, 2), ("auto", False, 4), ("bfloat16", False, 2), ("float32", True, 4)]
)
def test_the_dtype_is_that_of_the_pod_and_not_of_this_machine(dtype, on_gpu, size) -> None:
    settings = Settings(model=ModelSettings(dtype=dtype))
    assert settings_of_pod(settings, 1, on_gpu=on_gpu).dtype.itemsize == size


def test_a_step_asks_its_pool_for_what_it_needs(bench) -> None:
    bench.commit("code", 0)
    project = bench.project
    head, version, _ = find_step(project, "code", None)
    variables = pod_variables(project, head, version.domain, pool(), {})
    assert set(variables) == {"memory", "scratch", "gpus", "nodes"}
    assert (variables["gpus"], variables["nodes"]) == (0, 1)
    assert pod_variables(project, head, "code", pool(gpus=1), {})["gpus"] == 1
    assert pod_variables(project, head, "code", pool(), {"gpus": 1}) == {
        name: value for name, value in variables.items() if name != "gpus"
    }, "what the deployment says itself stays"
    assert pod_variables(project, head, "code", pool(), {"memory": "96Gi"}).keys() == {"scratch", "gpus", "nodes"}
    assert pod_variables(project, head, "code", pool("process"), {}) == {}
    own = pool()
    bare = own.model_copy(update={"base_job_template": {"variables": {"properties": {"image": {}}}}})
    assert pod_variables(project, head, "code", bare, {}) == {}, "Prefect's own template has none of them"


def test_the_server_takes_the_variables_with_the_run(prefect) -> None:
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name="sized", type="kubernetes", base_job_template=TEMPLATE))
        try:
            made = client.create_deployment(client.create_flow(adapt), "sized", work_pool_name="sized")
            deployment = client.read_deployment(made)
            assert pool_of(deployment).type == "kubernetes"
            variables = job_variables(PodSize(memory=5 * GIB, disk=GIB, gpus=0))
            run = start_run(client, made, "adapt code", {"domain": "code"}, "s" * 64, variables)
            assert run.job_variables == {"memory": "5Gi", "scratch": "1Gi", "gpus": 0, "nodes": 1}
            assert pool_of(deployment.model_copy(update={"work_pool_name": None})) is None
        finally:
            client.delete_work_pool("sized")


def test_the_watcher_sizes_the_step_that_it_starts(prefect, bench, monkeypatch) -> None:
    bench.commit("code", 0)
    started: list[tuple] = []
    monkeypatch.setattr(watch, "adapt_on_worker", lambda *given: started.append(given))
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name="sized", type="kubernetes", base_job_template=TEMPLATE))
        try:
            client.create_deployment(
                client.create_flow(adapt),
                "sized",
                work_pool_name="sized",
                parameters={"workspace": str(bench.root)},
                job_variables={"memory": "96Gi"},
            )
            watch.run_adapt(str(bench.root), "code", None)
        finally:
            client.delete_work_pool("sized")
    ((*_, variables),) = started
    assert set(variables) == {"scratch", "gpus", "nodes"}, "memory is what the deployment says"


def test_more_processes_make_a_larger_pod() -> None:
    with config_folder("llama-3-8b") as folder:
        one = settings_of_pod(Settings(), 3, on_gpu=True)
        small, large = (
            pod_size(estimate_step(folder, replace(one, processes=many)), many, on_gpu=True) for many in (1, 4)
        )
    assert (small.gpus, large.gpus) == (1, 4)
    assert large.memory > small.memory


def test_a_step_on_several_nodes_gets_as_many_pods_which_share_the_windows() -> None:
    settings = Settings(model=ModelSettings(nodes=4, processes=2))
    asked = settings_of_pod(settings, 3, on_gpu=True)
    with config_folder("llama-3-8b") as folder:
        found, alone = (estimate_step(folder, replace(asked, nodes=nodes)) for nodes in (4, 1))
    size = pod_size(found, asked.processes, on_gpu=True, nodes=asked.nodes)
    assert job_variables(size)["nodes"] == 4
    assert size.gpus == 2, "of each pod"
    assert asked.windows == 3, "of 24, one process's"
    assert found.memory.device <= alone.memory.device
