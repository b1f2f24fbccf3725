"""Statistics, two steps, one that is killed, and an evaluation, in however many processes.

python in_processes.py BASE WINDOWS OUT [BACKEND]

BACKEND: what the processes talk through, in place of accelerate's choice. On a GPU that is NCCL, which takes no two
processes on one device; gloo does.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed

from copal import resume
from copal.config import CalibrationConfig, PruneConfig
from copal.errors import SettingsError
from copal.evaluation import evaluate
from copal.processes import device, gather, is_main, share_of_windows
from copal.recorder import MomentRecorder
from copal.step import Base, NewDomain, Parent, StepReport, prune_step
from copal.streaming import StreamedModel

LAUNCH = (
    "-m accelerate.commands.launch --multi_gpu --num_machines 1 --mixed_precision no --dynamo_backend no "
    "--main_process_port 0"
)


def statistics(base: Path, windows: torch.Tensor, device: torch.device) -> dict[str, torch.Tensor]:
    """G of every group and the gradient statistic of every linear, before anything is rounded for the disk."""
    model, found = StreamedModel(base, device=device, dtype=torch.float32), {}
    stream = model.start(share_of_windows(windows), batch=8)
    for index, name in enumerate(model.architecture.blocks):
        with model.block(index) as block, MomentRecorder(block, gradient=True) as recorder:
            stream.advance(block)
        for group, moment in recorder.moments(1.0, name).items():
            root = moment.second.diagonal().sqrt()
            found[f"{name}.{group}"] = moment.second / torch.outer(root, root)
            found[f"{name}.{group}:root"] = root
            found |= {f"{name}.{linear}:gradient": values for linear, values in moment.gradient.items()}
    return {name: tensor.cpu().contiguous() for name, tensor in found.items()}


class KilledError(BaseException):
    """Raised in place of a kill."""


def killed_between_blocks(step: Callable[..., StepReport], out: Path) -> int:
    """A step that dies again and again: the main process has said that a block is finished, and the others have not.

    Returns how often it died before it came to its end.
    """
    real_gather, real_finish = resume.gather, resume.Unfinished.finish
    for attempt in range(100):
        calls = iter([*[False] * (1 + attempt % 2), True])

        def die(calls: Iterator[bool] = calls) -> None:
            if next(calls, False):
                raise KilledError

        def gather_or_die(value: Any, die: Callable[[], None] = die) -> list[Any]:
            if value is None:
                die()
            return real_gather(value)

        def finish_or_die(*args: Any, die: Callable[[], None] = die, **more: Any) -> None:
            die()
            real_finish(*args, **more)

        with pytest.MonkeyPatch.context() as patch:
            if is_main():
                patch.setattr(resume, "gather", gather_or_die)
            else:
                patch.setattr(resume.Unfinished, "finish", finish_or_die)
            try:
                step(out, resume=out.parent / "unfinished")
            except KilledError:
                continue
            return attempt
    raise AssertionError("it never came to its end")


def same_files(one: Path, two: Path) -> bool:
    """Whether two steps have written the same, but for the seconds in their reports."""
    files = [
        {path.relative_to(out): path.read_bytes() for path in out.rglob("*.*") if path.name != "report.json"}
        for out in (one, two)
    ]
    return len(files[0]) > 10 and files[0] == files[1]


def run(base: Path, windows: dict[str, torch.Tensor], out: Path, device: torch.device) -> None:
    """Writes OUT/statistics-of-code.safetensors, OUT/<domain>/ of each step and OUT/found.json."""
    of_code = statistics(base, windows["code"], device)
    if is_main():
        save_file(of_code, out / "statistics-of-code.safetensors")
    parent, reports = None, []
    for version, (name, tokens) in enumerate(windows.items(), start=2):
        step = partial(
            prune_step,
            Base(folder=base, fingerprint="base"),
            parent,
            NewDomain(name=name, md5="1", weight=float(version), windows=tokens),
            calibration=CalibrationConfig(),
            prune=PruneConfig(criterion="loss", iterations=30),
            device=device,
            dtype=torch.float32,
        )
        report = step(out / name)
        parent = Parent.from_step(out / name, version, parent)
        reports.append(report)
    died = killed_between_blocks(step, out / "killed")
    scores = evaluate(parent.model, windows, device=device, dtype=torch.float32)
    processes = len(gather(None))
    assert gather((reports, scores)) == [(reports, scores)] * processes
    odd = {"odd": windows["code"][:3]}  # of two processes, one walks twice and one once
    twice, once = (
        evaluate(base, odd, device=device, dtype=torch.float32, batch=1, hidden_bytes=most) for most in (1, 10**9)
    )
    assert twice == once
    refused = ""
    try:
        evaluate(parent.model, {"short": windows["code"][:1]}, device=device, dtype=torch.float32)
    except SettingsError as error:
        refused = str(error)
    if is_main():
        figures = {name: [score.nats, score.tokens] for name, score in scores.items()}
        back = [report.weights_back for report in reports]
        found = {"processes": processes, "scores": figures, "refused": refused, "back": back, "died": died}
        assert same_files(out / "killed", out / name)
        shutil.rmtree(out / "killed")
        (out / "found.json").write_text(json.dumps(found))


def launch(
    base: Path, windows: dict[str, torch.Tensor], out: Path, *backend: str, environment: dict[str, str] | None = None
) -> None:
    """`run` in two processes."""
    save_file(windows, out / "windows.safetensors")
    launch_script(
        Path(__file__), str(base), str(out / "windows.safetensors"), str(out), *backend, environment=environment
    )


def launch_script(script: Path, *arguments: str, processes: int = 2, environment: dict[str, str] | None = None) -> None:
    """A script of this folder in so many processes."""
    path = [*map(str, script.parents[1:3]), *filter(None, [os.environ.get("PYTHONPATH")])]
    subprocess.run(
        [sys.executable, *LAUNCH.split(), "--num_processes", str(processes), str(script), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path), **(environment or {})},
        timeout=300,
        check=True,
    )


def same(one: Path, two: Path) -> None:
    """Whether two processes, in the folder `two`, came to what one came to, killed or not."""
    statistics = [load_file(out / "statistics-of-code.safetensors") for out in (one, two)]
    torch.testing.assert_close(*statistics, rtol=1e-5, atol=1e-5)  # G as correlations: 1 is the most there is
    alone, together = (json.loads((out / "found.json").read_text()) for out in (one, two))
    assert (alone["processes"], together["processes"]) == (1, 2)
    for name, (nats, tokens) in alone["scores"].items():
        assert together["scores"][name][1] == tokens
        assert math.isclose(together["scores"][name][0], nats, rel_tol=1e-5)
    # All but equal scores may change places.
    assert all(abs(more - less) <= 2 for more, less in zip(together["back"], alone["back"], strict=True))
    assert min(alone["died"], together["died"]) > 3
    assert alone["refused"] == ""
    assert together["refused"].startswith(
        "2 processes (model.processes on each of model.nodes) cannot share 1 window: "
    )
    files = [{str(path.relative_to(out)) for path in out.rglob("*")} for out in (one, two)]
    assert files[1] - files[0] == {"windows.safetensors"}


if __name__ == "__main__":
    if sys.argv[4:]:
        distributed.init_process_group(sys.argv[4])
    run(Path(sys.argv[1]), load_file(sys.argv[2]), Path(sys.argv[3]), device())
