"""This machine and what runs on it: processes, device, what is free, code and libraries."""

from __future__ import annotations

import platform
import shutil
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
    "free_device_memory",
    "free_disk",
    "free_memory",
    "hardware",
    "has_gpu",
    "memory_used",
    "surroundings",
]


LIBRARIES = ("torch", "transformers", "tokenizers", "pyarrow", "accelerate", "safetensors", "prefect", "mlflow", "dvc")


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
    return {
        "code": code_version(),
        "libraries": {name: installed_version(name) for name in LIBRARIES} | {"python": platform.python_version()},
        "hardware": hardware(settings),
        "seeds": {"calibration": settings.calibration.seed},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def hardware(settings: Settings) -> dict[str, Any]:
    """What forward passes run on here, and their dtype."""
    import torch

    device, _ = device_and_dtype(settings)
    return {
        "machine": platform.machine(),
        "system": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": forward_dtype(settings),
    }


def free_disk(place: Path) -> int:
    """Bytes that a file in the folder `place`, which need not be there yet, may take."""
    there = next(folder for folder in (place.resolve(), *place.resolve().parents) if folder.is_dir())
    return shutil.disk_usage(there).free


def memory_used() -> int:
    """Bytes of memory that this process and those that it started take (resident set size)."""
    import psutil

    this = psutil.Process()
    used = int(this.memory_info().rss)
    for child in this.children(recursive=True):
        try:
            used += child.memory_info().rss
        except psutil.Error:  # it has ended meanwhile
            continue
    return used


def free_memory(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of memory that processes may still take: of the machine, or less where a container or a service is limited.

    Args:
        groups: where the system (Linux) tells of limits: those of this process's group and of the groups around it.
    """
    import psutil

    rooms = [int(psutil.virtual_memory().available)]
    for folder in _groups(groups):
        try:
            limit, used = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
            told = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            rooms.append(limit - used + int(told.get("inactive_file", 0)))  # of files: given back when it is wanted
        except (OSError, ValueError):  # no limit ("max"), or nothing of the kind
            continue
    return max(0, min(rooms))


def _groups(groups: Path) -> list[Path]:
    try:
        own = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return [groups]
    folder = groups / own.removeprefix("0::").strip("/")
    return [folder, *(parent for parent in folder.parents if parent == groups or groups in parent.parents)]


def free_device_memory(processes: int) -> int | None:
    """Bytes that are free on the fullest of the GPUs that so many processes take; None without one."""
    import torch

    if not has_gpu():
        return None
    return min(int(torch.cuda.mem_get_info(number)[0]) for number in range(min(processes, torch.cuda.device_count())))


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
