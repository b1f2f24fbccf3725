"""A step on a random model of Llama-2-7B's shape: seconds by part, peak memory, and SparseGPT on the same matrices.

A few blocks come first: a step, a step on top of that, both criteria. Each block is like the next, so that tells how
long all of them take; they follow where that time is left, and where the disk has room.
"""

from __future__ import annotations

import contextlib
import resource
import shutil
import time
from dataclasses import replace
from pathlib import Path

import cost
import torch
from inputs import Inputs

from copal.base import Base
from copal.config import CalibrationConfig, PruneConfig
from copal.evaluation import evaluate
from copal.step import NewDomain, Parent, prune_step
from gpu.checks import TOY
from gpu.part import Setting, Told, wait
from support.larger_than_memory import memory
from support.llamas import Llama, write_llama
from support.windows import dialect

CRITERIA = ("output", "loss")
_WRITTEN = 2.5  # a step's output as a multiple of its 16-bit base: model, contribution (0.4), sum (0.8), hidden states


def run(setting: Setting, told: Told) -> None:
    """A few blocks, then all."""
    few, whole = replace(setting.sizes.step, blocks=setting.sizes.few), setting.sizes.step
    _warm_up(setting)
    seconds: dict[str, float] = {}
    for llama, steps in ((few, 2), (whole, 1)):
        folder = setting.scratch / f"{llama.blocks}"
        needed = (1 + steps * _WRITTEN) * llama.parameters * setting.dtype.itemsize
        free = shutil.disk_usage(setting.scratch).free
        if needed > free:
            told.note(f"Left: {llama.blocks} blocks need {_gb(needed)} GB of disk, and {_gb(free)} GB are free.")
            continue
        # How long each takes, told by the steps on a few blocks; nothing is known of those themselves.
        expected = {name: 1.1 * measured * llama.blocks / few.blocks for name, measured in seconds.items()}
        if expected and min(expected.values()) > setting.left:
            told.note(_left(setting, llama, "any step", min(expected.values())))
            continue
        began = time.perf_counter()
        size = write_llama(folder / "base", llama, dtype=setting.dtype, device=setting.device)
        taken = time.perf_counter() - began
        told.note(f"Base of {llama.blocks} blocks: {_gb(size)} GB, made and written in {taken:.1f} s.")
        for criterion in CRITERIA:
            if expected.get(criterion, 0.0) > setting.left:
                told.note(_left(setting, llama, f"criterion {criterion}", expected[criterion]))
                continue
            first = _steps(setting, told, llama, folder, criterion, steps)
            seconds.setdefault(criterion, first + taken)
        if llama is few:
            _against_sparsegpt(setting, told, llama, folder)
        shutil.rmtree(folder)


def _warm_up(setting: Setting) -> None:
    """A step on a toy: what libraries load on first use is no part of what is measured."""
    folder = setting.scratch / "toy"
    write_llama(folder / "base", TOY, dtype=setting.dtype, device=setting.device)
    prune_step(
        Base(folder=folder / "base", fingerprint="random"),
        None,
        NewDomain(name="toy", md5="-", windows=dialect(0)),
        folder / "v",
        calibration=_calibration(setting),
        prune=PruneConfig(criterion="loss"),
        device=setting.device,
        dtype=setting.dtype,
    )
    shutil.rmtree(folder)


def _steps(setting: Setting, told: Told, llama: Llama, folder: Path, criterion: str, steps: int) -> float:
    """One step, or a second one on top of it. Returns the seconds of the first."""
    parent, seconds = None, list[float]()
    for number in range(1, steps + 1):
        parent, taken = _step(setting, told, llama, folder, criterion, number, parent)
        seconds.append(taken)
    for number in range(1, steps + 1):
        shutil.rmtree(folder / f"{criterion}-{number}")
    return seconds[0]


def _step(
    setting: Setting, told: Told, llama: Llama, folder: Path, criterion: str, number: int, parent: Parent | None
) -> tuple[Parent, float]:
    """A row of the table: a step and the evaluation of what it made; below a few blocks' row, its seconds scaled."""
    out = folder / f"{criterion}-{number}"
    _forget_peaks(setting.device)
    began = time.perf_counter()
    report = prune_step(
        Base(folder=folder / "base", fingerprint="random"),
        parent,
        NewDomain(name=f"{number}", md5="-", windows=setting.windows(number, llama.vocabulary)),
        out,
        calibration=_calibration(setting),
        prune=PruneConfig(criterion=criterion),
        device=setting.device,
        dtype=setting.dtype,
    )
    wait(setting.device)
    whole = time.perf_counter() - began
    evaluate(
        out / "model", {"held out": setting.windows(100 + number, llama.vocabulary)}, device=setting.device,
        dtype=setting.dtype,
    )  # fmt: skip
    evaluated = time.perf_counter() - began - whole
    parts = {name: report.seconds[name] for name in ("statistics", "solve")}
    parts |= {"read, write, compare": whole - sum(parts.values()), "whole step": whole, "evaluate": evaluated}
    which, table = {"criterion": criterion, "step": f"{number}"}, "Seconds and memory of a step"
    told.row(
        table,
        {
            "blocks": f"{llama.blocks}, measured",
            **which,
            **{f"{name}, s": f"{seconds:.1f}" for name, seconds in parts.items()},
            "device peak, GB": _device_peak(setting.device),
            "host peak, GB": _host_peak(),
            "model, GB": _gb(_bytes(out / "model")),
            "state, GB": _gb(_bytes(out / "state")),
            "zeros": f"{report.sparsity:.4f}",
        },
    )
    scale = setting.sizes.step.blocks / llama.blocks
    if scale > 1:
        scaled = {f"{name}, s": f"{scale * seconds:.1f}" for name, seconds in parts.items()}
        told.row(table, {"blocks": f"{setting.sizes.step.blocks}, that times {scale:g}"} | which | scaled)
    return Parent.from_step(out, number + 1, parent), whole + evaluated


def _against_sparsegpt(setting: Setting, told: Told, llama: Llama, folder: Path) -> None:
    """Both solves on every linear of two of the blocks (one, where there are no more), with the same statistics."""
    inputs = Inputs(
        base=Base(folder=folder / "base", fingerprint="random"),
        calibration={"a": setting.windows(1, llama.vocabulary)},
        evaluation={},
        device=setting.device,
        dtype=setting.dtype,
    )
    every = -(-llama.blocks // 2)
    blocks, whole = len(range(0, llama.blocks, every)), setting.sizes.step.blocks
    ratio = cost.solve(inputs, repeats=1, every=every)
    scale = whole / blocks
    for name, times in ((f"{blocks}, measured", 1.0), (f"{whole}, that times {scale:g}", scale)):
        told.row(
            "The solve against SparseGPT, the same matrices and statistics",
            {
                "blocks": name,
                "copal, s": f"{ratio.cost * times:.2f}",
                "SparseGPT, s": f"{ratio.reference * times:.2f}",
                "ratio": f"{ratio.value:.2f}",
            },
        )


def _calibration(setting: Setting) -> CalibrationConfig:
    return CalibrationConfig(window_length=setting.sizes.length, windows=setting.sizes.windows)


def _left(setting: Setting, llama: Llama, what: str, expected: float) -> str:
    return (
        f"Left: {llama.blocks} blocks, {what}: by the steps on {setting.sizes.few} blocks it takes {expected:.0f} s, "
        f"and {setting.left:.0f} s were left."
    )


def _forget_peaks(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):  # not every system has it: the peak is then that of all steps so far
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of resident memory begins anew


def _device_peak(device: torch.device) -> str:
    return _gb(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else "-"


def _host_peak() -> str:
    status = Path("/proc/self/status")
    if status.exists() and "VmHWM" in status.read_text():
        return _gb(memory("VmHWM"))
    return _gb(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}"
