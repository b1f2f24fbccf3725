"""One task of a step in several processes, on this machine (`flows.step.launch`) or on others too (`flows.step.gang`).

This module runs in each of them, and the task waits for them. Each machine has what they need in a folder of its own:
request.json, with that machine's own paths. The main process alone has the windows, windows.safetensors, which it sends
to the others; it writes the answer to result.json.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from safetensors.torch import load_file, save_file
from torch import Tensor

from copal.config import CalibrationConfig, PruneConfig
from copal.errors import CopalError, SmallerBatchWarning
from copal.evaluation import Score, evaluate
from copal.files import write_atomic
from copal.processes import copy_from_main, device, is_main, tensors_from_main
from copal.progress import Progress, silent
from copal.step import Base, NewDomain, Parent, StepReport, WithdrawnDomain, prune_step, read_report
from copal.streaming import compute_dtype
from flows.settings import Settings
from flows.step.launch import Fault, Place, check_devices, leave, raise_fault, run_processes, tell

if TYPE_CHECKING:
    from flows.step.gang import Helpers

__all__ = ["REQUEST_FILE", "evaluate_in_processes", "evaluate_jobs", "prune_in_processes"]

REQUEST_FILE, WINDOWS_FILE = "request.json", "windows.safetensors"


def prune_in_processes(
    folder: Path,
    settings: Settings,
    base: Base,
    parent: Parent | None,
    domain: NewDomain | WithdrawnDomain,
    out: Path,
    resume: Path,
    progress: Progress,
    helpers: Helpers | None = None,
) -> StepReport:
    """`copal.step.prune_step` in `model.processes` processes; `folder` is for what they are told and answer.

    Args:
        helpers: other machines, with as many processes each.
    """
    arrives = domain if isinstance(domain, NewDomain) else None
    request = {
        "task": "prune",
        "base": asdict(base),
        "parent": asdict(parent) if parent else None,
        "domain": {"name": domain.name} | ({"md5": arrives.md5, "weight": arrives.weight} if arrives else {}),
        "out": out,
        "resume": resume,
        "calibration": asdict(settings.calibration),
        "prune": asdict(settings.prune),
    }
    windows = {arrives.name: arrives.windows} if arrives else {}
    _in_processes(folder, settings, request, windows, progress, helpers)
    return read_report(out)


def evaluate_in_processes(
    folder: Path,
    settings: Settings,
    jobs: Sequence[tuple[Path, Sequence[str]]],
    windows: Mapping[str, Tensor],
    progress: Progress,
    helpers: Helpers | None = None,
) -> list[dict[str, Score]]:
    """`copal.evaluation.evaluate` of each job's checkpoint on each job's domains, in `model.processes` processes.

    Args:
        helpers: other machines, with as many processes each.
    """
    request = {"task": "evaluate", "jobs": [[checkpoint, list(domains)] for checkpoint, domains in jobs]}
    result = _in_processes(folder, settings, request, windows, progress, helpers)
    return [{domain: Score(*score) for domain, score in scores.items()} for scores in result]


def evaluate_jobs(
    jobs: Sequence[tuple[Path, Sequence[str]]],
    windows: Mapping[str, Tensor],
    *,
    dtype: str,
    batch: int,
    progress: Progress,
) -> list[dict[str, Score]]:
    """`copal.evaluation.evaluate` of each job's checkpoint on each job's domains, in this process."""
    here = device()
    return [
        evaluate(
            checkpoint,
            {domain: windows[domain] for domain in domains},
            device=here,
            dtype=compute_dtype(dtype, here),
            batch=batch,
            progress=progress,
        )
        for checkpoint, domains in jobs
    ]


def _in_processes(
    folder: Path,
    settings: Settings,
    request: dict[str, Any],
    windows: Mapping[str, Tensor],
    progress: Progress,
    helpers: Helpers | None,
) -> Any:
    processes = settings.model.processes
    check_devices(processes)
    folder.mkdir(parents=True)
    save_file({name: tokens.contiguous() for name, tokens in windows.items()}, folder / WINDOWS_FILE)
    request |= {"dtype": settings.model.dtype, "batch": settings.model.batch}
    text = json.dumps(request, default=str)
    write_atomic(folder / REQUEST_FILE, text)
    if helpers is None:
        fault = run_processes(folder, Place(processes=processes), progress)
        if fault is not None:
            raise_fault(fault)
    else:
        told = json.loads(text)
        if request["task"] == "evaluate":  # what no store has yet, the main process sends
            write_atomic(folder / REQUEST_FILE, json.dumps(told | {"new": str(helpers.new)}))
        helpers.run(told, processes, partial(run_processes, folder, progress=progress))
    return json.loads((folder / "result.json").read_text())


# --- in each process


def _main(folder: Path) -> int:
    request = json.loads((folder / REQUEST_FILE).read_text())
    warnings.showwarning = _show_warning
    try:
        own = load_file(folder / WINDOWS_FILE) if is_main() else None
        windows = {name: tokens.cpu() for name, tokens in tensors_from_main(own, device()).items()}
        task = {"prune": _prune, "evaluate": _evaluate}[request["task"]]
        result = task(request, windows, _tell_progress if is_main() else silent)
    except CopalError as error:
        leave(folder, Fault(type(error).__name__, (str(error),)))
        return 2
    except OSError as error:
        leave(folder, Fault("OSError", (error.errno, error.strerror, error.filename)))
        return 2
    if is_main():
        write_atomic(folder / "result.json", json.dumps(result))
    return 0


def _prune(request: dict[str, Any], windows: Mapping[str, Tensor], progress: Progress) -> None:
    base, parent, domain = request["base"], request["parent"], request["domain"]
    prune_step(
        Base(folder=Path(base["folder"]), fingerprint=base["fingerprint"]),
        _parent(parent) if parent else None,
        NewDomain(**domain, windows=windows[domain["name"]]) if windows else WithdrawnDomain(**domain),
        Path(request["out"]),
        calibration=CalibrationConfig(**request["calibration"]),
        prune=PruneConfig(**request["prune"]),
        device=device(),
        dtype=compute_dtype(request["dtype"], device()),
        batch=request["batch"],
        resume=Path(request["resume"]),
        progress=progress,
    )


def _parent(values: dict[str, Any]) -> Parent:
    states = {int(version): Path(state) for version, state in values["states"].items()}
    return Parent(version=values["version"], model=Path(values["model"]), state=Path(values["state"]), states=states)


def _evaluate(request: dict[str, Any], windows: Mapping[str, Tensor], progress: Progress) -> list[dict[str, Any]]:
    if new := request.get("new"):  # which no store has yet
        copy_from_main(Path(new))
    jobs = [(Path(checkpoint), domains) for checkpoint, domains in request["jobs"]]
    found = evaluate_jobs(jobs, windows, dtype=request["dtype"], batch=request["batch"], progress=progress)
    return [{domain: (score.nats, score.tokens) for domain, score in scores.items()} for scores in found]


def _tell_progress(stage: str, done: int, total: int) -> None:
    tell("progress", [stage, done, total])


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if issubclass(category, SmallerBatchWarning):
        tell("warning", str(message))


if __name__ == "__main__":
    sys.exit(_main(Path(sys.argv[1])))
