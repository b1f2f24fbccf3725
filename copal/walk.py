"""The walk of a step over the blocks: all that happens to one block, in `prune_block`.

    statistics   run the windows through the dense block; store what the new domain adds; add what the parent knows
    solve        find mask and weights of each group of linears, on the statistics of every domain
    write        store the pruned block in the layout and dtype of the base
    compare      the linears before and after, for the report

When `prune_block` returns, nothing of the block is left in memory: a model may be larger than that. What it and the
windows have come to is laid aside, so that a step that was killed goes on from there (`copal.resume`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from copal.allocation import RowZeros
from copal.checkpoint import Checkpoint, CheckpointWriter, Shard
from copal.config import PruneConfig
from copal.errors import ModelError, StateError
from copal.masks import follows
from copal.parent import ParentState
from copal.processes import gather, is_main, share, sum_by_name, tensors_from_main
from copal.progress import Clock, Progress
from copal.recorder import MomentRecorder
from copal.report import LayerReport, compare
from copal.resume import Part, Unfinished
from copal.sensitivity import Moment
from copal.solve import Pruned, PruneGroup
from copal.state import StateWriter, as_moments, merge_blocks
from copal.streaming import Stream, StreamedModel

__all__ = ["BlockStatistics", "Walk", "hidden_before", "prune_block", "take_statistics"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Walk:
    """Where the blocks of a step come from, what is done to them, and where they go.

    Attributes:
        base: the dense model.
        stream: the new domain's windows on their way through it; made-up tokens where a domain goes, which only show
            which linears read the same input.
        weight: w_i of the new domain; None where a domain goes.
        known: the parent's statistics of the domains that stay; None where there is no parent.
        parent: the parent's weights, likewise.
        prune, method: settings, and how a group of linears is pruned with them.
        checkpoint, state: what is written.
        work: what is finished of it.
        clock: of the parts `statistics` and `solve`.
        progress: told how far it is.
    """

    base: StreamedModel
    stream: Stream
    weight: float | None
    known: ParentState | None
    parent: Checkpoint | None
    prune: PruneConfig
    method: PruneGroup
    checkpoint: CheckpointWriter
    state: StateWriter
    work: Unfinished
    clock: Clock
    progress: Progress

    def write_outside(self) -> None:
        """Write what lies outside the blocks into the new model."""
        if not self.find("outside"):
            self.finish("outside", shard=self.checkpoint.write(self.base.stored_outside(), {}))

    def bring(self, index: int) -> None:
        """Bring the windows before block `index`, where an earlier run has left them there."""
        if self.stream.next != index:
            part = self.work.read(hidden_before(index))
            self.stream.go_on(index, part.tensors["hidden"], part.told["sizes"])

    def lay_hidden_aside(self) -> None:
        """Lay aside what the next block reads."""
        self.work.write(
            hidden_before(self.stream.next), {"hidden": self.stream.hidden.cpu()}, {"sizes": self.stream.sizes}
        )

    def find(self, name: str) -> Part | None:
        """What an earlier run has said in `finish` of `name`, if it came so far."""
        found = self.work.find(name)
        if found:
            self.state.adopt(found.told["state"])
            if found.told["shard"]:
                self.checkpoint.adopt(Shard(**found.told["shard"]))
        return found

    def finish(
        self,
        name: str,
        *,
        tensors: Mapping[str, Tensor] | None = None,
        told: Mapping[str, Any] | None = None,
        state: Mapping[str, str] | None = None,
        shard: Shard | None = None,
    ) -> None:
        """Say that `name` is finished, with what came of it.

        Args:
            tensors, told: see `copal.resume.Part`.
            state: files that were written for it (`StateWriter.written`).
            shard: likewise.
        """
        state = state or {}
        self.work.finish(
            name,
            tensors=tensors,
            told={**(told or {}), "state": state, "shard": asdict(shard) if shard else None},
            files=[*(f"state/{file}" for file in state), *([f"model/{shard.file}"] if shard else [])],
            seconds=self.clock.seconds,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockStatistics:
    """What the linears of one block read, by group.

    Attributes:
        groups: group -> its linears.
        tokens: of the new domain that reached the group; 0 where a domain goes.
        writers: linears that write to the residual stream.
        squares: diagonal of the total G (I,).
        new: moments of the new domain; None where a domain goes.
        before: moments over the domains that stay; None for the first domain.
        total: the sum of both.
        zeros: how many weights of each row go; None: as the settings say.
    """

    groups: Mapping[str, list[str]]
    tokens: Mapping[str, int]
    writers: Collection[str]
    squares: Mapping[str, Tensor]
    new: Mapping[str, Moment] | None
    before: Mapping[str, Moment] | None
    total: Mapping[str, Moment]
    zeros: RowZeros | None = None

    @classmethod
    def from_part(cls, part: Part, device: torch.device) -> Self:
        """Without moments."""
        return cls(
            groups=part.told["groups"],
            tokens=part.told["tokens"],
            writers=part.told["writers"],
            squares={group: squares.to(device) for group, squares in part.tensors.items()},
            new=None,
            before=None,
            total={},
        )

    def told(self) -> dict[str, Any]:
        """What `from_part` wants to be told; its tensors are `squares`."""
        return {"groups": self.groups, "tokens": self.tokens, "writers": sorted(self.writers)}

    def without_moments(self) -> BlockStatistics:
        """What takes no memory to speak of."""
        return replace(self, new=None, before=None, total={})


def hidden_before(index: int) -> str:
    """Name of the part that holds what block `index` reads."""
    return f"hidden-{index:05d}"


def prune_block(walk: Walk, index: int, taken: BlockStatistics | None = None) -> list[LayerReport]:
    """Prune block `index` and write it and its statistics, unless an earlier run has.

    Args:
        taken: its statistics, where they were taken and written before (`copal.survey`), without their moments.

    Returns:
        A report of each linear; nothing in a process that does not write (see `copal.processes`).
    """
    name = f"prune-{index:05d}"
    if found := walk.find(name):
        return [LayerReport(**layer) for layer in found.told["layers"]]
    shard, layers = _prune(walk, index, taken)
    if taken is None and walk.work.lasts:
        walk.lay_hidden_aside()
    walk.finish(
        name,
        told={"layers": [asdict(layer) for layer in layers]},
        state=walk.state.written(index) if taken is None else {},
        shard=shard,
    )
    walk.work.drop(hidden_before(index))
    return layers


def _prune(walk: Walk, index: int, taken: BlockStatistics | None) -> tuple[Shard | None, list[LayerReport]]:
    with walk.clock.measure("statistics"):
        statistics = _read_statistics(walk, index, taken) if taken else take_statistics(walk, index)
    dense = walk.base.weights(index)
    with walk.clock.measure("solve"):
        pruned, damping = _solve(walk, dense, statistics)
    idle = [linear for linear in dense if linear not in pruned]
    if idle:
        name = f"{walk.base.architecture.blocks[index]}.{idle[0]}"
        raise ModelError(f"{name} reads no input on this domain: copal cannot tell what it needs")
    if not is_main():
        return None, []
    shard, now = _write(walk, index, pruned)
    return shard, _compare(walk, index, dense, now, damping, statistics)


def take_statistics(walk: Walk, index: int) -> BlockStatistics:
    """Run the windows through block `index`, and write its new contribution and its new sum."""
    walk.bring(index)
    name, gradient = walk.base.architecture.blocks[index], walk.prune.criterion == "gradient"
    with (
        walk.base.block(index) as block,
        MomentRecorder(block, gradient=gradient and walk.weight is not None) as recorder,
    ):
        walk.stream.advance(block, again=recorder.clear)
    groups, new = recorder.groups(), None
    if walk.weight is not None:
        new = walk.state.contribution(index, recorder.moments(walk.weight, name), recorder.shapes())
    before = walk.known.moments(index, walk.base.device) if walk.known else None
    total = merge_blocks([part for part in (before, new) if part])
    if total.keys() != groups.keys():
        raise StateError(f"the state of {name} is of other linears than the base has: it is damaged")
    walk.state.sum(index, total)
    return BlockStatistics(
        groups=groups,
        tokens={group: recorder.routed(group) if new else 0 for group in groups},
        writers=recorder.writers(walk.stream.hidden_size),
        squares={group: moment.total.diagonal().clone() for group, moment in total.items()},
        new=new,
        before=before,
        total=total,
    )


def _read_statistics(walk: Walk, index: int, taken: BlockStatistics) -> BlockStatistics:
    """The statistics of block `index` that `take_statistics` wrote.

    A process that does not write gets the sum from the main one, and neither part of it.
    """
    stored = walk.state.read_sum(index) if is_main() else None
    total = as_moments(tensors_from_main(stored, walk.base.device))
    if not is_main():
        return replace(taken, total=total)
    before = walk.known.moments(index, walk.base.device) if walk.known else None
    new = walk.state.read_contribution(index) if walk.weight is not None else None
    return replace(taken, new=new, before=before, total=total)


def _solve(
    walk: Walk, dense: Mapping[str, Tensor], statistics: BlockStatistics
) -> tuple[dict[str, Tensor], dict[str, float | None]]:
    """Each process prunes its share of the groups. Returns all processes' linear -> W' (O, I), and group -> damping."""
    made: dict[str, Pruned] = {}
    for group, linears in share(list(statistics.groups.items())):
        weights = {name: dense[name] for name in linears}
        made[group] = walk.method(weights, statistics.total[group], walk.prune, statistics.zeros)
    pruned = sum_by_name({name: weight for one in made.values() for name, weight in one.weights.items()})
    dampings = gather({group: one.damping for group, one in made.items()})
    return pruned, {group: damping for one in dampings for group, damping in one.items()}


def _write(walk: Walk, index: int, pruned: Mapping[str, Tensor]) -> tuple[Shard | None, dict[str, Tensor]]:
    """Write the pruned block. Returns also its weights as rounded to the dtype in which they are stored."""
    stored = walk.base.stored_weights(index, pruned)
    shard = walk.checkpoint.write(walk.base.stored_block(index), stored)
    now = walk.base.weights(index, stored)
    if walk.prune.pattern:
        assert all(follows(weight, walk.prune.pattern) for weight in now.values())
    return shard, now


def _compare(
    walk: Walk,
    index: int,
    dense: Mapping[str, Tensor],
    now: Mapping[str, Tensor],
    damping: Mapping[str, float | None],
    statistics: BlockStatistics,
) -> list[LayerReport]:
    """Compare every linear of the block, group by group."""
    was = walk.base.weights(index, walk.parent) if walk.parent else {}
    reports = []
    for group, linears in statistics.groups.items():
        new = (statistics.new or statistics.total)[group].second
        old = statistics.before[group].second if statistics.new and statistics.before else None
        for linear in linears:
            reports.append(
                compare(
                    f"{walk.base.architecture.blocks[index]}.{linear}",
                    dense=dense[linear],
                    was=was.get(linear),
                    now=now[linear],
                    new=new,
                    old=old,
                    tokens=statistics.tokens[group],
                    damping=damping[group],
                )
            )
    return reports
