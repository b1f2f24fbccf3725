"""What a step on a model would take on named hardware: what `copal sizes` tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from copal.estimate import Estimate
    from copal.hardware import Hardware
    from copal.shapes import StepSettings

__all__ = ["as_plain", "known_sizes", "sizes", "step_settings"]

_HERE = "this machine"


def sizes(model: str, settings: StepSettings) -> dict[str, Any]:
    """What a step on `model` takes, as plain JSON values.

    Each with model, parameters, blocks; settings; disk, memory and operations as `as_plain` has them, for a step in
    memory alone (`cpu`) and for one with a GPU (`gpu`); seconds by hardware and part.

    Args:
        model: a Hugging Face folder, or a name in `copal.known.CONFIGS`.

    Raises:
        ModelError: it is neither.
    """
    from copal.estimate import estimate, seconds
    from copal.hardware import NAMED
    from copal.known import config_folder
    from copal.shapes import model_shape

    with config_folder(model) as folder:
        shape = model_shape(folder, settings)
    on_gpu, on_cpu = (estimate(shape, replace(settings, on_gpu=on_gpu)) for on_gpu in (True, False))
    hardware: dict[str, Hardware] = {_HERE: _here(settings, shape.hidden), **NAMED}
    return {
        "model": model,
        "parameters": shape.parameters,
        "blocks": shape.block_count,
        "settings": {
            "calibration": asdict(settings.calibration),
            "prune": asdict(settings.prune),
            "domains": settings.domains,
            "batch": settings.batch,
            "processes": settings.processes,
            "dtype": str(settings.dtype).removeprefix("torch."),
        },
        **as_plain(on_gpu),
        "memory": {"cpu": on_cpu.memory.host, "gpu": on_gpu.memory.device, "beside_gpu": on_gpu.memory.host},
        "hardware": {name: {"memory": one.memory} for name, one in hardware.items()},
        "seconds": {
            name: seconds(on_gpu, one, 1 if name == _HERE else settings.processes) for name, one in hardware.items()
        },
    }


def step_settings(
    *,
    windows: int,
    window_length: int,
    storage: str,
    criterion: str,
    domains: int,
    batch: int,
    processes: int,
    dtype: str,
) -> StepSettings:
    """Settings of a step that is not to be taken.

    Raises:
        SettingsError: a value is out of range.
    """
    import torch

    from copal.config import CalibrationConfig, PruneConfig
    from copal.shapes import StepSettings

    return StepSettings(
        calibration=CalibrationConfig(windows=windows, window_length=window_length, storage=storage),
        prune=PruneConfig(criterion=criterion),
        domains=domains,
        batch=batch,
        processes=processes,
        dtype=getattr(torch, dtype),
        resumes=True,
    )


def as_plain(found: Estimate) -> dict[str, Any]:
    """Bytes on disk by part, what stays of them (`version`), and operations by part of a step."""
    return {
        "disk": {**asdict(found.disk), "version": found.disk.version},
        "operations": {part: {"half": work.half, "single": work.single} for part, work in found.work.items()},
    }


def known_sizes(settings: StepSettings) -> dict[str, Any]:
    """Of every model in `copal.known.CONFIGS`: parameters, bytes of the model and of one domain's contribution."""
    from copal.estimate import estimate
    from copal.known import CONFIGS, config_folder
    from copal.shapes import model_shape

    found: dict[str, Mapping[str, int]] = {}
    for name in CONFIGS:
        with config_folder(name) as folder:
            shape = model_shape(folder, settings)
        full, compact = (
            estimate(shape, replace(settings, calibration=replace(settings.calibration, storage=storage))).disk
            for storage in ("full", "compact")
        )
        found[name] = {
            "parameters": shape.parameters,
            "model": full.model,
            "full": full.contribution,
            "compact": compact.contribution,
        }
    return {"models": found}


def _here(settings: StepSettings, size: int) -> Hardware:
    """This machine, in the dtype that suits it."""
    from copal.hardware import this_machine
    from copal.processes import device
    from copal.streaming import compute_dtype

    here = device()
    return this_machine(here, compute_dtype("auto", here), size)
