"""How large a pod a step gets where its pool is one of Kubernetes: memory, scratch disk and GPUs, as job variables; and
how many pods.

A pool of processes has machines, and a step looks there whether it fits (`flows.step.resources`). A pod is made for one
step: too small it is killed, too large it waits for a node that nobody needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flows.project import Project
from flows.settings import Settings
from flows.step.resources import config_of_base, domains_after, needs

if TYPE_CHECKING:
    from prefect.client.schemas.objects import WorkPool

    from copal.estimate import Estimate
    from copal.shapes import StepSettings
    from flows.registry.versions import ModelVersion

__all__ = ["PodSize", "job_variables", "pod_size", "pod_variables", "settings_of_pod"]

_GIB = 1 << 30
_PYTHON = 2 * _GIB  # of memory: Python with torch, Prefect and MLflow in a process; on a GPU, CUDA's own beside it
_SHARED = 1 * _GIB  # of memory: /dev/shm, by which processes of a step speak to one another
_DATA = 10 * _GIB  # of disk: git, the new domain's data and its windows, logs


@dataclass(frozen=True, kw_only=True, slots=True)
class PodSize:
    """What the pods for one step must have, each of them.

    Attributes:
        nodes: how many.
        memory: bytes, of all its processes.
        disk: bytes of scratch: what the step fetches and what it writes.
        gpus: one for each process, or 0.
    """

    memory: int
    disk: int
    gpus: int
    nodes: int = 1


def pod_size(found: Estimate, processes: int, *, on_gpu: bool, nodes: int = 1) -> PodSize:
    """The pods for a step that takes what `found` says, its estimate for these nodes, processes and devices.

    A pod begins with an empty disk: base and parent come down beside what the step itself needs.
    """
    own = needs(found, processes)
    fetched = found.disk.model + found.disk.version
    return PodSize(
        memory=own.memory + _PYTHON * processes + _SHARED,
        disk=own.disk + fetched + _DATA,
        gpus=processes if on_gpu else 0,
        nodes=nodes,
    )


def job_variables(size: PodSize) -> dict[str, str | int]:
    """The variables of infra/kubernetes/base/job-template.json; bytes become whole GiB."""
    return {
        "memory": _quantity(size.memory),
        "scratch": _quantity(size.disk),
        "gpus": size.gpus,
        "nodes": size.nodes,
    }


def settings_of_pod(settings: Settings, domains: int, *, on_gpu: bool) -> StepSettings:
    """What decides how large a step is in a pod that this process does not see.

    `model.dtype: auto` is bfloat16 on a GPU, and on a CPU float32, the larger of the two that it may be there.
    """
    import torch

    from copal.shapes import StepSettings

    half = settings.model.dtype == "bfloat16" or (settings.model.dtype == "auto" and on_gpu)
    return StepSettings(
        calibration=settings.calibration,
        prune=settings.prune,
        domains=domains,
        dtype=torch.bfloat16 if half else torch.float32,
        batch=settings.model.batch,
        processes=settings.model.processes,
        nodes=settings.model.nodes,
        on_gpu=on_gpu,
    )


def pod_variables(
    project: Project, head: ModelVersion, domain: str, pool: WorkPool, given: Mapping[str, Any]
) -> dict[str, str | int]:
    """The job variables with which a run of `adapt` gets a pod of its size; none where the pool is of another type.

    What the deployment says itself (`given`: its own job variables) goes before, and a variable that the pool's
    template does not know is left out. Only config.json of the base is fetched.

    Raises:
        ModelError: the base cannot be read.
        RegistryError: the registry does not answer.
    """
    if pool.type != "kubernetes":
        return {}
    from copal.estimate import estimate_step

    known: Mapping[str, Any] = pool.base_job_template.get("variables", {}).get("properties", {})
    default = known.get("gpus", {}).get("default") or 0
    on_gpu = int(given.get("gpus", default)) > 0
    asked = settings_of_pod(project.settings, domains_after(project.registry, head, domain), on_gpu=on_gpu)
    with config_of_base(project.registry) as folder:
        if folder is None:
            return {}
        size = pod_size(estimate_step(folder, asked), asked.processes, on_gpu=on_gpu, nodes=asked.nodes)
    return {name: value for name, value in job_variables(size).items() if name in known and name not in given}


def _quantity(size: int) -> str:
    return f"{-(-size // _GIB)}Gi"
