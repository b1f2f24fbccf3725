"""This machine and what runs on it: processes, device, code and libraries."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.data.git import run_git
from flows.settings import Settings

if TYPE_CHECKING:
    import psutil
    import torch

__all__ = [
    "code_version",
    "device_and_dtype",
    "forward_dtype",
    "has_gpu",
    "surroundings",
]


LIBRARIES = ("torch", "transformers", "tokenizers", "datasets", "accelerate", "safetensors", "prefect", "mlflow", "dvc")


def has_gpu() -> bool:
    """Whether a step would run on a GPU here."""
    from copal.processes import device

    return device().type != "cpu"


def device_and_dtype(settings: Settings) -> tuple[torch.device, torch.dtype]:
    from copal.processes import device
    from copal.streaming import compute_dtype

    here = device()
    return here, compute_dtype(settings.model.dtype, here)


def forward_dtype(settings: Settings) -> str:
    """The dtype of forward passes here, as records tell it: `bfloat16`, say."""
    return str(device_and_dtype(settings)[1]).removeprefix("torch.")


def surroundings(settings: Settings) -> dict[str, Any]:
    """What made a version beside data and settings: code, libraries, hardware, seeds, time."""
    import torch

    device, _ = device_and_dtype(settings)
    return {
        "code": code_version(),
        "libraries": {name: installed_version(name) for name in LIBRARIES} | {"python": platform.python_version()},
        "hardware": {
            "machine": platform.machine(),
            "system": platform.platform(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "dtype": forward_dtype(settings),
        },
        "seeds": {"calibration": settings.calibration.seed},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def code_version() -> dict[str, Any]:
    """Version of copal and, where it runs from its own git checkout, the commit and whether that was changed."""
    here = Path(__file__).resolve().parent

    def ask(*arguments: str) -> str | None:
        done = run_git(here, *arguments)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        released = installed_version("copal")
    except PackageNotFoundError:
        released = "unknown"
    if ask("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return {"version": released, "git_commit": None, "dirty": None}
    changed = ask("status", "--porcelain", "--untracked-files=no", "--", "..")
    return {"version": released, "git_commit": ask("rev-parse", "HEAD"), "dirty": bool(changed)}


def find_process(pid: int, started: float) -> psutil.Process | None:
    """The process with number `pid` that started at `started` (seconds since the epoch); None where it ended."""
    import psutil

    try:
        found = psutil.Process(pid)
        same = abs(found.create_time() - started) < 1.0
        return found if same and found.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None
