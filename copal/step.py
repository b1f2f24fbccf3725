"""One step of continual pruning: add a domain to what the model is pruned for, or take one out.

The statistics come from the dense base model, so they depend neither on a mask nor on the order of the domains. One
walk over the base's blocks does everything for a block while it is in memory (`copal.walk`); where the loss decides how
many weights of each row go, a walk forward and back comes before it (`copal.survey`). Masks are decided from the dense
weights each time: a weight that an earlier step pruned comes back when a new domain needs it.

Where several processes run the step together (`copal.processes`), each runs its share of the windows and solves its
share of the linears; the main one writes.

A step that is given a folder for it lays aside what it has finished block by block; where it was killed, the next run
of the same step goes on from there (`copal.resume`), to the same bits.

Taking a domain out is the same walk without windows: what is left is the sum of the other domains' contributions.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version as installed_version
from pathlib import Path

import torch
from torch import Tensor

from copal.base import Base
from copal.checkpoint import Checkpoint, CheckpointWriter
from copal.config import CalibrationConfig, Pattern, PruneConfig, fingerprint
from copal.errors import ModelError, StateError
from copal.out_of_memory import memory_for
from copal.packing import block_bytes
from copal.parent import Parent, ParentState
from copal.processes import from_main, is_main, processes, share_of_windows
from copal.progress import Clock, Progress, silent
from copal.report import LayerReport, StepReport, read_report, write_report
from copal.resume import unfinished
from copal.solve import PruneGroup, prune_group
from copal.state import DomainEntry, Manifest, StateWriter
from copal.streaming import Stream, StreamedModel, place
from copal.survey import survey
from copal.walk import Walk, prune_block

__all__ = [
    "Base",
    "LayerReport",
    "NewDomain",
    "Parent",
    "StepReport",
    "WithdrawnDomain",
    "prune_step",
    "read_report",
]

# Of the windows fewer at a time may do (`copal.streaming`), beside them nothing does.
_ONE_BLOCK = "the statistics and the solve of one block, however small model.batch is", "take a device with more"
_PROBE = 8  # made-up tokens that show which linears read the same input, where there are no windows


@dataclass(frozen=True, kw_only=True, slots=True)
class NewDomain:
    """The domain that a step brings.

    Attributes:
        name: one that the parent's state holds already is replaced.
        md5: version of its data, as the manifest will tell it: any text that differs where the data does.
        weight: w_i, what it counts beside the other domains.
        windows: calibration windows (N, L), see `copal.calibration.domain_windows`.
    """

    name: str
    md5: str
    weight: float = 1.0
    windows: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class WithdrawnDomain:
    """A domain of the parent that a step takes out, as if it had never been seen. No text of it is needed."""

    name: str


Domain = NewDomain | WithdrawnDomain


def prune_step(
    base: Base,
    parent: Parent | None,
    domain: Domain,
    out: Path,
    *,
    calibration: CalibrationConfig,
    prune: PruneConfig,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    batch: int = 8,
    method: PruneGroup | None = None,
    resume: Path | None = None,
    progress: Progress = silent,
) -> StepReport:
    """Prune the base for what `parent` knows and `domain`: writes `out`/model, `out`/state and the report.

    `out` appears whole or not at all, and `read_report` reads the report again.

    Args:
        parent: None for the first domain.
        calibration: what the windows were cut with.
        device: None: this process's own GPU, or the CPU.
        dtype: of the forward pass and of products that bear rounding; sums are float32. None: the fastest here.
        batch: windows that run through a block at a time; halved where memory runs out. Results differ by rounding.
        resume: a folder on the disk of `out` for what is finished block by block. Where the same step was killed, or
            ended by an error of the machine, the next call with that folder goes on from its last whole block, to the
            same bits. It goes when the step is finished. None: nothing is kept.
        method: how a group of linears is pruned: `copal.solve.prune_group`, or one of `copal.baselines`.

    Raises:
        ModelError: the base or the parent's model cannot be read.
        StateError: the parent's state is damaged or was made otherwise, or has no domain beside the one that is to go.
        NumericsError: an activation, a statistic or a solution is not finite.
        ResourceError: memory is not enough for one window at a time, or for the statistics and the solve of a block.
        SettingsError: more processes than windows.
    """
    known = _known(base, parent, domain, calibration, prune)
    model = _load(base, prune, device, dtype)
    settings = (calibration.fingerprint(), prune.fingerprint(), batch, repr(method))  # a function's place in memory
    same = _fingerprint(base, parent, known, domain, model, settings) if resume else ""
    with unfinished(out, resume, same) as work, memory_for(*_ONE_BLOCK):
        clock, layers = Clock(work.seconds), list[LayerReport]()
        checkpoint, state = _writers(model, work.version, calibration)
        stream = _start(model, domain, batch, clock)
        walk = Walk(
            base=model,
            stream=stream,
            weight=domain.weight if isinstance(domain, NewDomain) else None,
            known=known,
            parent=Checkpoint(parent.model) if parent else None,
            prune=prune,
            method=method or partial(prune_group, products=model.dtype),
            checkpoint=checkpoint,
            state=state,
            work=work,
            clock=clock,
            progress=progress,
        )
        walk.write_outside()
        taken = survey(walk) if prune.criterion == "loss" else None
        for index in range(len(model)):
            layers += prune_block(walk, index, taken[index] if taken else None)
            progress("prune", index + 1, len(model))
        checkpoint.finish()
        manifest = _manifest(state, base, domain, known, calibration, prune)
        report = StepReport(layers=tuple(layers), manifest=manifest, seconds=clock.seconds)
        if is_main():
            write_report(work.version, report)
    return from_main(report)


def _known(
    base: Base,
    parent: Parent | None,
    domain: Domain,
    calibration: CalibrationConfig,
    prune: PruneConfig,
) -> ParentState | None:
    """What the parent knows of the other domains, once it is sure that this step may build on it."""
    known = ParentState(parent, domain.name) if parent else None
    if known:
        known.manifest.require(
            base=base.fingerprint, statistics=calibration.fingerprint(), criterion=prune.criterion, where=known.folder
        )
    if isinstance(domain, WithdrawnDomain) and not (known and known.replaces and known.others):
        raise StateError(f"{domain.name} cannot go: it must be one of several domains in the parent's state")
    return known


def _load(base: Base, prune: PruneConfig, device: torch.device | None, dtype: torch.dtype | None) -> StreamedModel:
    """The dense model, once it is sure that the settings fit it."""
    device, dtype = place(device, dtype)
    model = StreamedModel(base.folder, device=device, dtype=dtype)
    if prune.pattern:
        _check_groups(model, prune.pattern)
    return model


def _check_groups(model: StreamedModel, pattern: Pattern) -> None:
    for index, block in enumerate(model.architecture.blocks):
        for linear, (_, features) in model.shapes(index).items():
            if features % pattern.of:
                raise ModelError(
                    f"{block}.{linear} has {features} input features, no multiple of {pattern.of}: "
                    f"its rows have no whole groups for prune.sparsity {pattern.kept}:{pattern.of}"
                )


def _writers(
    model: StreamedModel, folder: Path, calibration: CalibrationConfig
) -> tuple[CheckpointWriter, StateWriter]:
    """The new model and the new state."""
    checkpoint = CheckpointWriter(model.checkpoint, folder / "model", shards=len(model) + 1, writes=is_main())
    compact = block_bytes(model.model.num_parameters(), len(model)) if calibration.storage == "compact" else None
    return checkpoint, StateWriter(folder / "state", compact, device=model.device, writes=is_main())


def _start(model: StreamedModel, domain: Domain, batch: int, clock: Clock) -> Stream:
    """This process's share of the new domain's windows before the first block, or made-up tokens (1, L)."""
    with clock.measure("statistics"):
        if isinstance(domain, WithdrawnDomain):
            return model.start(torch.arange(_PROBE).unsqueeze(0), batch)
        return model.start(share_of_windows(domain.windows), batch)


def _fingerprint(
    base: Base,
    parent: Parent | None,
    known: ParentState | None,
    domain: Domain,
    model: StreamedModel,
    settings: Sequence[str | int],
) -> str:
    """Of all that decides the bits of a step: what another step has finished is not gone on from."""
    new = domain if isinstance(domain, NewDomain) else None
    windows = hashlib.sha256(new.windows.numpy(force=True).tobytes()).hexdigest() if new else None
    on_gpu = model.device.type == "cuda"
    machine = torch.cuda.get_device_name(model.device) if on_gpu else torch.backends.cpu.get_cpu_capability()
    return fingerprint(
        {
            "base": base.fingerprint,
            "parent": [parent.version, str(parent.model.resolve())] if parent else None,
            "state": asdict(known.manifest) if known else None,
            "domain": [domain.name, [new.md5, new.weight, list(new.windows.shape), windows] if new else None],
            "settings": [*settings, str(model.dtype), processes(), torch.get_num_threads()],
            "code": [installed_version("copal"), torch.__version__],
            "machine": [platform.machine(), machine],
        }
    )


def _manifest(
    state: StateWriter,
    base: Base,
    domain: Domain,
    known: ParentState | None,
    calibration: CalibrationConfig,
    prune: PruneConfig,
) -> Manifest:
    """Finish the state: what it was made of, and where each domain's contribution is."""
    own = None
    if isinstance(domain, NewDomain):
        own = DomainEntry(
            name=domain.name,
            md5=domain.md5,
            weight=domain.weight,
            tokens=domain.windows.numel(),
            windows=len(domain.windows),
            version=None,
            shards={},
        )
    return state.finish(
        base=base.fingerprint,
        statistics=calibration.fingerprint(),
        criterion=prune.criterion,
        own=own,
        others=known.others if known else (),
    )
