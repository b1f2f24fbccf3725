"""One task of a step in several processes: `accelerate launch` runs this module in each, and the task waits for them.

The processes get what they need as files in a folder of the step: request.json and windows.safetensors. The main
process tells its progress in lines on standard output, and writes the answer to result.json. A process that cannot go
on writes error-PID.json; the launcher then ends the others.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from copal import errors
from copal.config import CalibrationConfig, PruneConfig
from copal.errors import CopalError, ResourceError, SettingsError, SmallerBatchWarning
from copal.evaluation import Score, evaluate
from copal.files import write_atomic
from copal.printable import printable_lines
from copal.processes import device, is_main
from copal.progress import Progress, silent
from copal.step import Base, NewDomain, Parent, StepReport, WithdrawnDomain, prune_step, read_report
from copal.streaming import compute_dtype
from flows.isolated import isolated_environment, isolated_python
from flows.settings import Settings

__all__ = ["evaluate_in_processes", "evaluate_jobs", "prune_in_processes"]

# In place of the user's own configuration, which may be for another machine or purpose. MULTI_GPU means several
# processes, on a CPU as well.
_ACCELERATE = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "MULTI_GPU",
    "mixed_precision": "no",
    "use_cpu": False,
    "debug": False,
}
_KILLED = re.compile(r"exitcode\s*: -9\b")


def prune_in_processes(
    folder: Path,
    settings: Settings,
    base: Base,
    parent: Parent | None,
    domain: NewDomain | WithdrawnDomain,
    out: Path,
    resume: Path,
    progress: Progress,
) -> StepReport:
    """`copal.step.prune_step` in `model.processes` processes; `folder` is for what they are told and answer."""
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
    _in_processes(folder, settings, request, {arrives.name: arrives.windows} if arrives else {}, progress)
    return read_report(out)


def evaluate_in_processes(
    folder: Path,
    settings: Settings,
    jobs: Sequence[tuple[Path, Sequence[str]]],
    windows: Mapping[str, Tensor],
    progress: Progress,
) -> list[dict[str, Score]]:
    """`copal.evaluation.evaluate` of each job's checkpoint on each job's domains, in `model.processes` processes."""
    request = {"task": "evaluate", "jobs": [[checkpoint, list(domains)] for checkpoint, domains in jobs]}
    result = _in_processes(folder, settings, request, windows, progress)
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
    folder: Path, settings: Settings, request: dict[str, Any], windows: Mapping[str, Tensor], progress: Progress
) -> Any:
    processes = settings.model.processes
    if torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise SettingsError(f"model.processes is {processes}, but this machine has {torch.cuda.device_count()} GPUs")
    folder.mkdir(parents=True)
    save_file({name: tokens.contiguous() for name, tokens in windows.items()}, folder / "windows.safetensors")
    request |= {"dtype": settings.model.dtype, "batch": settings.model.batch}
    write_atomic(folder / "request.json", json.dumps(request, default=str))
    write_atomic(folder / "accelerate.json", json.dumps(_ACCELERATE))
    threads = max(1, torch.get_num_threads() // processes)
    command = [
        *isolated_python("accelerate.commands.launch", "--config_file", str(folder / "accelerate.json")),
        *("--num_machines", "1", "--num_processes", str(processes), "--main_process_port", "0"),
        *("--num_cpu_threads_per_process", str(threads), "-m", "flows.step.distributed", str(folder)),
    ]
    log = folder / "log"
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=isolated_environment()
        ) as launcher,
    ):
        try:
            assert launcher.stdout is not None
            _listen(launcher.stdout, progress)
        except BaseException:
            launcher.terminate()  # it ends the processes
            raise
    if launcher.returncode != 0:
        _raise(sorted(folder.glob("error-*.json")), log.read_text())
    return json.loads((folder / "result.json").read_text())


def _listen(lines: Iterable[str], progress: Progress) -> None:
    for line in lines:
        kind, _, value = line.partition(" ")
        if kind == "progress":
            progress(*json.loads(value))
        elif kind == "warning":
            warnings.warn(json.loads(value), SmallerBatchWarning, stacklevel=2)
        else:  # a library's
            print(printable_lines(line), end="", file=sys.stderr)


def _raise(files: list[Path], log: str) -> None:
    if files:
        told = json.loads(files[0].read_text())
        if told["kind"] == "OSError":
            raise OSError(*told["arguments"])
        raise getattr(errors, told["kind"])(*told["arguments"])
    if _KILLED.search(log):
        raise ResourceError(
            "the system killed a process of the step, most likely for want of memory: lower model.processes"
        )
    raise RuntimeError(f"a process of the step failed:\n{log}")


# --- in each process


def _main(folder: Path) -> int:
    request = json.loads((folder / "request.json").read_text())
    windows = load_file(folder / "windows.safetensors")
    warnings.showwarning = _show_warning
    try:
        task = {"prune": _prune, "evaluate": _evaluate}[request["task"]]
        result = task(request, windows, _tell_progress if is_main() else silent)
    except CopalError as error:
        _leave(folder, type(error).__name__, str(error))
        return 2
    except OSError as error:
        _leave(folder, "OSError", error.errno, error.strerror, error.filename)
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
    jobs = [(Path(checkpoint), domains) for checkpoint, domains in request["jobs"]]
    found = evaluate_jobs(jobs, windows, dtype=request["dtype"], batch=request["batch"], progress=progress)
    return [{domain: (score.nats, score.tokens) for domain, score in scores.items()} for scores in found]


def _tell(kind: str, value: Any) -> None:
    print(kind, json.dumps(value), flush=True)


def _tell_progress(stage: str, done: int, total: int) -> None:
    _tell("progress", [stage, done, total])


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if issubclass(category, SmallerBatchWarning):
        _tell("warning", str(message))


def _leave(folder: Path, kind: str, *arguments: Any) -> None:
    write_atomic(folder / f"error-{os.getpid()}.json", json.dumps({"kind": kind, "arguments": arguments}))


if __name__ == "__main__":
    sys.exit(_main(Path(sys.argv[1])))
