"""Whether a GPU does what the CPU does: each check takes real parts, and raises AssertionError where one is wrong."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from copal.base import Base
from copal.config import CalibrationConfig, PruneConfig
from copal.errors import SmallerBatchWarning
from copal.evaluation import evaluate
from copal.files import sha256_file
from copal.step import NewDomain, prune_step
from copal.streaming import StreamedModel
from gpu.part import Setting, Told
from support.architectures import write_model
from support.llamas import Llama, write_llama
from support.versions import CALIBRATION, COMPACT, Lineage, share_of_other_masks
from support.windows import dialect

Check = Callable[[Setting], str | None]
"""Returns why it was left out, if it was."""

CPU = torch.device("cpu")
TOY = Llama(hidden=64, inner=128, blocks=2, heads=4, key_value_heads=2, vocabulary=128)


def run(setting: Setting, told: Told) -> None:
    """Every check, though one before it failed."""
    for name, check in checks(setting.sizes.architectures).items():
        began = time.perf_counter()
        with TemporaryDirectory(dir=setting.scratch) as scratch:
            try:
                left_out = check(replace(setting, scratch=Path(scratch)))
                result = f"left out: {left_out}" if left_out else "ok"
            except Exception as error:  # noqa: BLE001 - whatever it is, it is told, and the next check runs
                result = f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
                told.fail(f"{name}: {result}")
        seconds = f"{time.perf_counter() - began:.1f}"
        told.row("The GPU against the CPU", {"check": name, "result": result, "seconds": seconds})


def checks(architectures: tuple[str, ...]) -> dict[str, Check]:
    """Every check by its name."""
    steps: dict[str, Check] = {
        "two steps, criterion output": _two_steps,
        "two steps, criterion gradient": partial(_two_steps, prune=PruneConfig(criterion="gradient")),
        "two steps, criterion loss": partial(_two_steps, prune=PruneConfig(criterion="loss"), most=0.01),
        "two steps, 2:4": partial(_two_steps, prune=PruneConfig(sparsity="2:4")),
        "two steps, compact storage": partial(_two_steps, calibration=COMPACT, most=0.05),
        "order and withdrawal": _order_and_withdrawal,
        "the same bits each time": _same_bits,
        "memory that runs out halves the batch": _halved,
        "torch takes 2:4 weights": _semi_structured,
    }
    return steps | {f"a step on {name}": partial(_architecture, name=name) for name in architectures}


def _two_steps(
    setting: Setting,
    prune: PruneConfig | None = None,
    calibration: CalibrationConfig = CALIBRATION,
    most: float = 0.001,
) -> None:
    """At most the share `most` of weights is zero after one and not after the other."""
    write_llama(setting.scratch / "base", TOY, spread=0.3)
    ends = []
    for number, device in enumerate((CPU, setting.device)):
        lineage = _lineage(setting, str(number), prune or PruneConfig(), device)
        lineage.calibration = calibration
        for seed, name in enumerate(("code", "legal")):
            lineage.add(name, dialect(seed))
        ends.append(lineage.weights())
    _few(share_of_other_masks(*ends), most)


def _order_and_withdrawal(setting: Setting) -> None:
    """Neither the order of the domains matters nor a domain that has gone."""
    write_llama(setting.scratch / "base", TOY, spread=0.3)
    windows = {name: dialect(seed) for seed, name in enumerate(("code", "legal"))}
    one, other, never = (_lineage(setting, name, PruneConfig(), setting.device) for name in ("one", "other", "never"))
    for lineage, names in ((one, ("code", "legal")), (other, ("legal", "code")), (never, ("code",))):
        for name in names:
            lineage.add(name, windows[name])
    _few(share_of_other_masks(one.weights(), other.weights()), 1e-4)
    one.withdraw("legal")
    _few(share_of_other_masks(one.weights(), never.weights()), 1e-4)


def _same_bits(setting: Setting) -> None:
    """A step that is made again has the same files: with long windows, in the dtype that is fastest here."""
    write_llama(setting.scratch / "base", replace(TOY, hidden=256, inner=512))
    digests = []
    for name in ("once", "again"):
        prune_step(
            Base(folder=setting.scratch / "base", fingerprint="-"),
            None,
            NewDomain(name="code", md5="-", windows=dialect(0, windows=4, length=setting.sizes.length)),
            setting.scratch / name,
            calibration=CalibrationConfig(),
            prune=PruneConfig(criterion="loss"),
            device=setting.device,
            dtype=setting.dtype,
        )
        made = setting.scratch / name
        files = [path for path in made.rglob("*") if path.is_file() and path.name != "report.json"]  # it has seconds
        digests.append({str(path.relative_to(made)): sha256_file(path) for path in files})
    differ = [file for file, digest in sorted(digests[0].items()) if digests[1].get(file) != digest]
    assert not differ, f"made again, these differ: {', '.join(differ)}"


def _halved(setting: Setting) -> str | None:
    """Memory for a quarter of the windows at a time, and what comes out is what all at a time give."""
    if setting.device.type != "cuda":
        return "needs a CUDA device"
    write_llama(setting.scratch / "base", replace(TOY, hidden=1024, inner=4096, blocks=1))
    windows = dialect(0, windows=64, length=512)
    model = StreamedModel(setting.scratch / "base", device=setting.device, dtype=torch.float32)
    ends = []
    for most in (None, 700 * 2**20):  # bytes; gate and up alone are 512 MiB each for 64 windows
        with model.block(0) as block:
            stream = model.start(windows, batch=64)
            torch.cuda.empty_cache()
            whole = torch.cuda.get_device_properties(setting.device).total_memory
            share = (torch.cuda.memory_reserved(setting.device) + most) / whole if most else 1.0
            torch.cuda.set_per_process_memory_fraction(share, torch.cuda.current_device())
            try:
                with warnings.catch_warnings(record=True) as told:
                    warnings.simplefilter("always", SmallerBatchWarning)
                    stream.advance(block)
            finally:
                torch.cuda.set_per_process_memory_fraction(1.0, torch.cuda.current_device())
            halvings = sum(issubclass(warning.category, SmallerBatchWarning) for warning in told)
            assert bool(halvings) == bool(most), f"{halvings} warnings with room for {most or 'everything'}"
            ends.append(stream.hidden.cpu())
            del stream
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-4)
    return None


def _semi_structured(setting: Setting) -> str | None:
    if setting.device.type != "cuda" or torch.cuda.get_device_capability(setting.device) < (8, 0):
        return "semi-structured kernels need a CUDA device of compute capability 8.0 or newer"
    write_llama(setting.scratch / "base", replace(TOY, hidden=128, inner=256), spread=0.3)
    lineage = _lineage(setting, "made", PruneConfig(sparsity="2:4"), setting.device)
    lineage.add("code", dialect(0))
    for name, weight in lineage.weights().items():
        half = weight.to(setting.device, torch.float16)
        sparse = torch.sparse.to_sparse_semi_structured(half)
        torch.testing.assert_close(sparse.to_dense(), half, msg=lambda text, name=name: f"{name}: {text}")
    return None


def _architecture(setting: Setting, name: str) -> None:
    """The dense model, a step with the criterion that uses most, and what the step has made."""
    base, windows = setting.scratch / "base", dialect(0, vocabulary=64)
    write_model(name, base)
    lineage = _lineage(setting, "made", PruneConfig(criterion="loss"), setting.device)
    lineage.add("code", windows)
    for folder in (base, lineage.model):
        one, other = (
            evaluate(folder, {"code": windows}, device=device, dtype=torch.float32)["code"].perplexity
            for device in (CPU, setting.device)
        )
        assert abs(one / other - 1) < 1e-3, f"perplexity of {folder.name}: {one:.4f} on the CPU, {other:.4f} here"


def _lineage(setting: Setting, name: str, prune: PruneConfig, device: torch.device) -> Lineage:
    return Lineage(setting.scratch / "base", setting.scratch / name, prune, str(device))


def _few(share: float, most: float) -> None:
    assert share <= most, f"{share:.3%} of the weights are zero in one and not in the other, {most:.3%} may be"
