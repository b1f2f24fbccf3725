"""One step of continual pruning: the whole story.

The statistics come from the dense base model, so they depend neither on a mask nor on the order of the domains, and one
walk over the base's blocks does everything for a block while it is in memory. Masks are decided from the dense weights
each time: a weight that an earlier step pruned comes back when a new domain needs it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from copal.checkpoint import Checkpoint, CheckpointWriter
from copal.compact import block_bytes
from copal.config import CalibrationConfig, PruneConfig
from copal.errors import ModelError
from copal.files import atomic_folder
from copal.masks import zeros
from copal.progress import Progress, silent
from copal.sensitivity import Moment, output_energy, record_moments
from copal.solve import prune_group
from copal.state import DomainEntry, Manifest, StateReader, StateWriter, merge_blocks
from copal.streaming import StreamedModel

__all__ = ["Base", "LayerReport", "NewDomain", "Parent", "PruneGroup", "StepReport", "prune_step"]

PruneGroup = Callable[[Mapping[str, Tensor], Moment, PruneConfig], dict[str, Tensor]]
"""(linear -> W (O, I), the statistics of their common input, settings) -> linear -> W' (O, I)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Base:
    """The dense model: a Hugging Face folder with safetensors weights, and its fingerprint."""

    folder: Path
    fingerprint: str


@dataclass(frozen=True, kw_only=True, slots=True)
class NewDomain:
    """The domain of this step: its data's version, weight w_i and calibration windows (N, L)."""

    name: str
    md5: str
    weight: float
    windows: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Parent:
    """The pruned version that this step builds on.

    Attributes:
        version: its number, for the manifest.
        model: its Hugging Face folder.
        state: its state folder.
        states: version -> state folder, of every version that its manifest names; read only when a domain's data is
            replaced or the parent's sum was dropped.
    """

    version: int
    model: Path
    state: Path
    states: Mapping[int, Path]


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerReport:
    """What the step did to one linear.

    Attributes:
        name: dotted name in the model.
        weights, zeros, weights_back: counts; back are those that are zero in the parent and not here.
        error_before, error_after: tr((W - W') G (W - W')^T) / tr(W G W^T) on the new domain, with the parent's weights
            and with the new ones; before is None where the parent is dense.
        response_shift: tr(W G_new W^T) / tr(W G_old W^T); None for the first domain.
    """

    name: str
    weights: int
    zeros: int
    weights_back: int
    error_before: float | None
    error_after: float
    response_shift: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """What a step made. `seconds`: of the statistics (forward included) and of the solve."""

    layers: tuple[LayerReport, ...]
    manifest: Manifest
    seconds: Mapping[str, float]

    @property
    def sparsity(self) -> float:
        """Zeros among the weights of the pruned linears, as counted in the stored dtype."""
        return sum(layer.zeros for layer in self.layers) / sum(layer.weights for layer in self.layers)

    @property
    def weights_back(self) -> int:
        """Weights that are zero in the parent and not here."""
        return sum(layer.weights_back for layer in self.layers)


def prune_step(
    base: Base,
    parent: Parent | None,
    domain: NewDomain,
    out: Path,
    *,
    calibration: CalibrationConfig,
    prune: PruneConfig,
    device: torch.device,
    dtype: torch.dtype,
    batch: int = 8,
    method: PruneGroup = prune_group,
    progress: Progress = silent,
) -> StepReport:
    """Add `domain` to what `parent` knows and prune the base again: writes `out`/model and `out`/state.

    A domain that the parent's state already holds is replaced. `out` appears whole or not at all.

    Args:
        parent: None for the first domain.
        dtype: of the forward pass; sums and solves are float32.
        batch: windows that run through a block at a time.
        method: how the linears of a group are pruned; the baselines have the same signature.

    Raises:
        ModelError: the base or the parent's model cannot be read.
        StateError: the parent's state is damaged, or of another base or other settings.
        NumericsError: an activation, a statistic or a solution is not finite.
    """
    old = _OldState(parent, domain.name) if parent else None
    if old:
        old.manifest.require(
            base=base.fingerprint, statistics=calibration.fingerprint(), criterion=prune.criterion, where=old.folder
        )
    model = StreamedModel(base.folder, device=device, dtype=dtype)
    parent_model = Checkpoint(parent.model) if parent else None
    clock, layers = _Clock(), list[LayerReport]()
    with atomic_folder(out) as folder:
        checkpoint = CheckpointWriter(model.checkpoint, folder / "model", shards=len(model) + 1)
        checkpoint.write(model.stored_outside(), {})
        compact = block_bytes(model.parameters, len(model)) if calibration.storage == "compact" else None
        state = StateWriter(folder / "state", compact)
        with clock.measure("statistics"):
            stream = model.start(domain.windows, batch)
        for index, name in enumerate(model.architecture.blocks):
            with clock.measure("statistics"), model.block(index) as block:
                with record_moments(block, gradient=prune.criterion == "gradient") as recorder:
                    stream.advance(block)
                new = state.contribution(index, recorder.moments(domain.weight, name), recorder.shapes())
                before = old.moments(index, device) if old else None
                total = merge_blocks([before, new]) if before else new
                state.sum(index, total)
            dense = model.weights(index)
            with clock.measure("solve"):
                pruned = dict[str, Tensor]()
                for group, linears in recorder.groups().items():
                    pruned |= method({linear: dense[linear] for linear in linears}, total[group], prune)
            idle = [linear for linear in dense if linear not in pruned]
            if idle:
                raise ModelError(f"{name}.{idle[0]} reads no input on this domain: copal cannot tell what it needs")
            stored = model.stored_weights(index, pruned)
            checkpoint.write(model.stored_block(index), stored)
            now = model.weights(index, stored)  # as rounded to the dtype in which they are stored
            was = model.weights(index, parent_model) if parent_model else {}
            for group, linears in recorder.groups().items():
                after, earlier = new[group].second, before[group].second if before else None
                for linear in linears:
                    layer = f"{name}.{linear}"
                    layers.append(_report(layer, dense[linear], was.get(linear), now[linear], after, earlier))
            progress("prune", index + 1, len(model))
        checkpoint.finish()
        own = DomainEntry(
            name=domain.name,
            md5=domain.md5,
            weight=domain.weight,
            tokens=domain.windows.numel(),
            windows=len(domain.windows),
            version=None,
            shards={},
        )
        manifest = state.finish(
            base=base.fingerprint,
            statistics=calibration.fingerprint(),
            criterion=prune.criterion,
            own=own,
            others=old.others if old else (),
        )
    return StepReport(layers=tuple(layers), manifest=manifest, seconds=clock.seconds)


class _OldState:
    """The parent's statistics without the domain that this step brings."""

    def __init__(self, parent: Parent, domain: str) -> None:
        self._reader = StateReader(parent.state)
        self.folder, self.manifest = parent.state, self._reader.manifest
        self.others = tuple(
            replace(entry, version=parent.version if entry.version is None else entry.version)
            for entry in self.manifest.domains
            if entry.name != domain
        )
        self._replaces = len(self.others) < len(self.manifest.domains)
        self._states = {**parent.states, parent.version: parent.state}
        self._readers: dict[int, StateReader] = {}

    def moments(self, index: int, device: torch.device) -> dict[str, Moment] | None:
        """Of block `index`: the stored sum, or one made anew where a domain is replaced or the sum was dropped."""
        if not self._replaces and self._reader.has_sum(index):
            return self._reader.sum(index, device)
        parts = [
            self._contributions(entry.version).contribution(index, entry, device)
            for entry in self.others
            if entry.version is not None
        ]
        return merge_blocks(parts) if parts else None

    def _contributions(self, version: int) -> StateReader:
        if version not in self._readers:
            self._readers[version] = StateReader(self._states[version])
        return self._readers[version]


class _Clock:
    """Seconds spent in named parts of the step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - began


def _report(name: str, dense: Tensor, was: Tensor | None, now: Tensor, new: Tensor, old: Tensor | None) -> LayerReport:
    """Compare one linear's weights (O, I) before and after on G_new (I, I) and G_old (I, I)."""
    energy = output_energy(dense, new)
    old_energy = output_energy(dense, old) if old is not None else 0.0

    def error(weight: Tensor) -> float:
        return output_energy(dense - weight, new) / energy if energy > 0 else 0.0

    return LayerReport(
        name=name,
        weights=dense.numel(),
        zeros=zeros(now),
        weights_back=int(((was == 0) & (now != 0)).sum()) if was is not None else 0,
        error_before=error(was) if was is not None else None,
        error_after=error(now),
        response_shift=energy / old_energy if old_energy > 0 else None,
    )
