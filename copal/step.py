"""One step of continual pruning: the whole story.

The statistics come from the dense base model, so they depend neither on a mask nor on the order of the domains, and one
walk over the base's blocks does everything for a block while it is in memory. Masks are decided from the dense weights
each time: a weight that an earlier step pruned comes back when a new domain needs it.

Where several processes run the step together (`copal.processes`), each runs its share of the windows and solves its
share of the linears; the main one writes.

Taking a domain out is the same walk without windows: what is left is the sum of the other domains' contributions.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from copal.checkpoint import Checkpoint, CheckpointWriter
from copal.compact import block_bytes
from copal.config import CalibrationConfig, Pattern, PruneConfig
from copal.errors import ModelError, StateError
from copal.files import atomic_folder, write_json
from copal.masks import follows, zeros
from copal.processes import from_main, gather, is_main, share, share_of_windows, sum_by_name
from copal.progress import Progress, silent
from copal.sensitivity import Moment, output_energy, record_moments
from copal.solve import Pruned, prune_group
from copal.state import DomainEntry, Manifest, StateReader, StateWriter, merge_blocks
from copal.streaming import StreamedModel

__all__ = [
    "Base",
    "LayerReport",
    "NewDomain",
    "Parent",
    "PruneGroup",
    "StepReport",
    "WithdrawnDomain",
    "prune_step",
    "read_report",
]

_REPORT = "report.json"
_PROBE = 8  # made-up tokens that show which linears read the same input, where there are no windows

PruneGroup = Callable[[Mapping[str, Tensor], Moment, PruneConfig], Pruned]
"""(linear -> W (O, I), the statistics of their common input, settings) -> linear -> W' (O, I), and the damping."""


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
class WithdrawnDomain:
    """A domain of the parent that this step takes out, as if it had never been seen: no text of it is needed."""

    name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Parent:
    """The pruned version that this step builds on.

    Attributes:
        version: its number, for the manifest.
        model: its Hugging Face folder.
        state: its state folder.
        states: version -> state folder, of every version that its manifest names; read only when a domain's data is
            replaced or withdrawn, or the parent's sum was dropped.
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
        features: of its input.
        tokens: of the new domain that it read; of an expert, those that are routed to it. 0 where a domain goes.
        weights, zeros, weights_back: counts; back are those that are zero in the parent and not here.
        error_before, error_after: tr((W - W') G (W - W')^T) / tr(W G W^T) on the new domain, with the parent's weights
            and with the new ones; before is None where the parent is dense. On all that stay, where a domain goes.
        response_shift: tr(W G_new W^T) / tr(W G_old W^T); None for the first domain, and where a domain goes.
        damping: what the solve added to the diagonal of G (`copal.solve.Damped`); None where it solved nothing.
    """

    name: str
    features: int
    tokens: int
    weights: int
    zeros: int
    weights_back: int
    error_before: float | None
    error_after: float
    response_shift: float | None
    damping: float | None


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

    @property
    def short(self) -> tuple[str, ...]:
        """Linears of experts to which fewer tokens are routed than they have input features, in the new domain.

        What is routed elsewhere stands in: `copal.sensitivity.OTHERS_SHARE`.
        """
        most = max(layer.tokens for layer in self.layers)
        return tuple(layer.name for layer in self.layers if layer.tokens < min(layer.features, most))


def prune_step(
    base: Base,
    parent: Parent | None,
    domain: NewDomain | WithdrawnDomain,
    out: Path,
    *,
    calibration: CalibrationConfig,
    prune: PruneConfig,
    device: torch.device,
    dtype: torch.dtype,
    batch: int = 8,
    method: PruneGroup | None = None,
    progress: Progress = silent,
) -> StepReport:
    """Add `domain` to what `parent` knows and prune the base again: writes `out`/model, `out`/state and the report.

    A domain that the parent's state already holds is replaced. A `WithdrawnDomain` is taken out: the rest of the
    contributions, merged in the order in which they came, is what a parent that never had it would know.

    `out` appears whole or not at all (`read_report`).

    Args:
        parent: None for the first domain.
        dtype: of the forward pass and of products whose rounding the result bears; sums are float32.
        batch: windows that run through a block at a time; halved where memory runs out. Results differ by rounding.
        method: how the linears of a group are pruned: `copal.solve.prune_group`, or a baseline.

    Raises:
        ModelError: the base or the parent's model cannot be read.
        StateError: the parent's state is damaged, of another base or other settings, or holds nothing else than the
            domain that is to go.
        NumericsError: an activation, a statistic or a solution is not finite.
        ResourceError: memory is not enough for one window at a time.
        SettingsError: more processes than windows.
    """
    method = method or partial(prune_group, products=dtype)
    old = _OldState(parent, domain.name) if parent else None
    if old:
        old.manifest.require(
            base=base.fingerprint, statistics=calibration.fingerprint(), criterion=prune.criterion, where=old.folder
        )
    arrives = domain if isinstance(domain, NewDomain) else None
    if not arrives and not (old and old.replaces and old.others):
        raise StateError(f"{domain.name} cannot go: it must be one of several domains in the parent's state")
    model = StreamedModel(base.folder, device=device, dtype=dtype)
    if prune.pattern:
        _check_groups(model, prune.pattern)
    parent_model = Checkpoint(parent.model) if parent else None
    clock, layers = _Clock(), list[LayerReport]()
    writes = is_main()
    with atomic_folder(out) if writes else nullcontext(out) as folder:
        checkpoint = CheckpointWriter(model.checkpoint, folder / "model", shards=len(model) + 1, writes=writes)
        checkpoint.write(model.stored_outside(), {})
        compact = block_bytes(model.model.num_parameters(), len(model)) if calibration.storage == "compact" else None
        state = StateWriter(folder / "state", compact, writes=writes)
        with clock.measure("statistics"):
            stream = model.start(share_of_windows(arrives.windows) if arrives else _probe(), batch)

        def prune_block(index: int, name: str) -> list[LayerReport]:
            """A function, so that nothing of a block is in memory when the next one comes."""
            with clock.measure("statistics"), model.block(index) as block:
                with record_moments(block, gradient=bool(arrives) and prune.criterion == "gradient") as recorder:
                    stream.advance(block, again=recorder.clear)
                new = before = None
                if arrives:
                    new = state.contribution(index, recorder.moments(arrives.weight, name), recorder.shapes())
                if old:
                    before = old.moments(index, device)
                total = merge_blocks([known for known in (before, new) if known])
                if total.keys() != recorder.groups().keys():
                    raise StateError(f"the state of {name} is of other linears than the base has: it is damaged")
                state.sum(index, total)
            dense = model.weights(index)
            with clock.measure("solve"):
                pruned, damping = dict[str, Tensor](), dict[str, float | None]()
                for group, linears in share(list(recorder.groups().items())):
                    made = method({linear: dense[linear] for linear in linears}, total[group], prune)
                    pruned |= made.weights
                    damping[group] = made.damping
                pruned = sum_by_name(pruned)
                damping = {group: used for one in gather(damping) for group, used in one.items()}
            idle = [linear for linear in dense if linear not in pruned]
            if idle:
                raise ModelError(f"{name}.{idle[0]} reads no input on this domain: copal cannot tell what it needs")
            if not writes:
                return []
            stored = model.stored_weights(index, pruned)
            checkpoint.write(model.stored_block(index), stored)
            now = model.weights(index, stored)  # as rounded to the dtype in which they are stored
            if prune.pattern:
                assert all(follows(weight, prune.pattern) for weight in now.values())
            was = model.weights(index, parent_model) if parent_model else {}
            reports = []
            for group, linears in recorder.groups().items():
                after = (new or total)[group].second
                earlier = before[group].second if new and before else None
                tokens = recorder.routed(group) if new else 0
                for linear in linears:
                    weights = (dense[linear], was.get(linear), now[linear])
                    reports.append(_report(f"{name}.{linear}", tokens, damping[group], *weights, after, earlier))
            return reports

        for index, name in enumerate(model.architecture.blocks):
            layers += prune_block(index, name)
            progress("prune", index + 1, len(model))
        checkpoint.finish()
        own = None
        if arrives:
            own = DomainEntry(
                name=arrives.name,
                md5=arrives.md5,
                weight=arrives.weight,
                tokens=arrives.windows.numel(),
                windows=len(arrives.windows),
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
        report = StepReport(layers=tuple(layers), manifest=manifest, seconds=clock.seconds)
        if writes:
            told = {"layers": [asdict(layer) for layer in layers], "seconds": clock.seconds}
            write_json(folder / _REPORT, told)
    return from_main(report)


def read_report(out: Path) -> StepReport:
    """The report of the step that wrote the folder `out`.

    Raises:
        StateError: `out` is not what a step wrote, or is damaged.
    """
    manifest = StateReader(out / "state").manifest
    try:
        told = json.loads((out / _REPORT).read_text(encoding="utf-8"))
        layers = tuple(LayerReport(**layer) for layer in told["layers"])
        return StepReport(layers=layers, manifest=manifest, seconds=told["seconds"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StateError(f"{out / _REPORT} cannot be read: {error}") from error


class _OldState:
    """The parent's statistics without the domain that this step brings or takes out."""

    def __init__(self, parent: Parent, domain: str) -> None:
        self._reader = StateReader(parent.state)
        self.folder, self.manifest = parent.state, self._reader.manifest
        self.others = tuple(
            replace(entry, version=parent.version if entry.version is None else entry.version)
            for entry in self.manifest.domains
            if entry.name != domain
        )
        self.replaces = len(self.others) < len(self.manifest.domains)
        self._states = {**parent.states, parent.version: parent.state}
        self._readers: dict[int, StateReader] = {}

    def moments(self, index: int, device: torch.device) -> dict[str, Moment] | None:
        """Of block `index`: the stored sum, or one made anew where a domain goes or the sum was dropped.

        Contributions are added in the order in which they came, as steps add them: a sum made anew is the same to the
        last bit.
        """
        if not self.replaces and self._reader.has_sum(index):
            return self._reader.sum(index, device)
        held = {entry.version: entry for entry in self.others if entry.version is not None}
        parts = [self._contributions(version).contribution(index, held[version], device) for version in sorted(held)]
        return merge_blocks(parts) if parts else None

    def _contributions(self, version: int) -> StateReader:
        if version not in self._readers:
            self._readers[version] = StateReader(self._states[version])
        return self._readers[version]


def _probe() -> Tensor:
    """A window (1, L) of made-up tokens; what they give is not recorded in the state."""
    return torch.arange(_PROBE).unsqueeze(0)


def _check_groups(model: StreamedModel, pattern: Pattern) -> None:
    for index, block in enumerate(model.architecture.blocks):
        for linear, (_, features) in model.shapes(index).items():
            if features % pattern.of:
                raise ModelError(
                    f"{block}.{linear} has {features} input features, no multiple of {pattern.of}: "
                    f"its rows have no whole groups for prune.sparsity {pattern.kept}:{pattern.of}"
                )


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


def _report(
    name: str,
    tokens: int,
    damping: float | None,
    dense: Tensor,
    was: Tensor | None,
    now: Tensor,
    new: Tensor,
    old: Tensor | None,
) -> LayerReport:
    """Compare one linear's weights (O, I) before and after on G_new (I, I) and G_old (I, I)."""
    energy = output_energy(dense, new)
    old_energy = output_energy(dense, old) if old is not None else 0.0

    def error(weight: Tensor) -> float:
        return output_energy(dense - weight, new) / energy if energy > 0 else 0.0

    return LayerReport(
        name=name,
        features=dense.shape[1],
        tokens=tokens,
        weights=dense.numel(),
        zeros=zeros(now),
        weights_back=int(((was == 0) & (now != 0)).sum()) if was is not None else 0,
        error_before=error(was) if was is not None else None,
        error_after=error(now),
        response_shift=energy / old_energy if old_energy > 0 else None,
        damping=damping,
    )
