"""What has to be known of all blocks before the first one is pruned, where the loss decides (criterion `loss`).

    forward      take the statistics of every block, and keep what each block reads
    back         bring the gradient of the loss back block by block: the Fisher information of outputs
    allocation   one threshold over the whole model: the zeros of each row

What a block reads is kept on disk beside the step's output until the way back: a model may be larger than memory, and
so may the hidden states of all its blocks. A step that was killed goes on from the last whole block of either way
(`copal.resume`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from copal.allocation import Prices, RowZeros, Threshold, row_prices
from copal.errors import StateError
from copal.fisher import Fisher, FisherRecorder, add_fisher
from copal.processes import from_main
from copal.walk import BlockStatistics, Walk, hidden_before, take_statistics

__all__ = ["survey"]


def survey(walk: Walk) -> list[BlockStatistics]:
    """The statistics of every block, without their moments, which are written to the state, and with their zeros.

    Raises:
        NumericsError, ResourceError, StateError: see `copal.step.prune_step`.
    """
    blocks = range(len(walk.base))
    taken = [_forward(walk, index) for index in blocks]
    if found := walk.find("survey"):
        walk.progress("statistics", _steps(walk), _steps(walk))
        zeros = [_of_block(index, found.tensors) for index in blocks]
    else:
        zeros = _back_and_allocate(walk, taken)
    if walk.prune.pattern:
        return taken
    return [replace(statistics, zeros=rows) for statistics, rows in zip(taken, zeros, strict=True)]


def _back_and_allocate(walk: Walk, taken: list[BlockStatistics]) -> list[RowZeros]:
    """All that follows the way forward; what was laid aside until then is not needed afterwards."""
    fisher, zeros = _fisher(walk, taken), list[RowZeros]()
    if not walk.prune.pattern:
        zeros = _allocate(walk, taken, fisher)
    walk.finish(
        "survey",
        tensors={f"{index}:{linear}": rows for index, found in enumerate(zeros) for linear, rows in found.items()},
        state=walk.state.written(None),
    )
    for index in range(len(walk.base) + 1):
        walk.work.drop(hidden_before(index), _gradient_before(index), _fisher_of(index), _prices_of(index))
    return zeros


def _forward(walk: Walk, index: int) -> BlockStatistics:
    """The statistics of block `index` without their moments, which are on disk, as is what the next block reads."""
    name, comes_back = f"statistics-{index:05d}", walk.weight is not None
    if found := walk.find(name):
        taken = BlockStatistics.from_part(found, walk.base.device)
    else:
        if index == 0 and comes_back:
            walk.lay_hidden_aside()
        with walk.clock.measure("statistics"):
            taken = take_statistics(walk, index).without_moments()
        if walk.work.lasts or (comes_back and index + 1 < len(walk.base)):
            walk.lay_hidden_aside()
        walk.finish(name, tensors=taken.squares, told=taken.told(), state=walk.state.written(index))
        if not comes_back:
            walk.work.drop(hidden_before(index))
    walk.progress("statistics", index + 1, _steps(walk))
    return taken


def _fisher(walk: Walk, taken: list[BlockStatistics]) -> Fisher:
    """The Fisher information over every domain, which is written to the state."""
    new = _back(walk, taken, walk.weight) if walk.weight is not None else None
    before = walk.known.fisher(walk.base.device) if walk.known else None
    total = add_fisher([part for part in (before, new) if part])
    linears = {
        f"{name}.{linear}"
        for index, name in enumerate(walk.base.architecture.blocks)
        for linear in walk.base.shapes(index)
    }
    if total.keys() != linears:
        raise StateError("the Fisher information in the state is of other linears than the base has: it is damaged")
    walk.state.fisher(new, total)
    return total


def _back(walk: Walk, taken: list[BlockStatistics], weight: float) -> Fisher:
    """The new domain's Fisher information."""
    fisher, gradient, blocks = dict[str, Tensor](), None, len(walk.base)
    for index in reversed(range(blocks)):
        if found := walk.find(_fisher_of(index)):
            fisher |= {name: rows.to(walk.base.device) for name, rows in found.tensors.items()}
        else:
            with walk.clock.measure("statistics"):
                gradient = _gradient(walk, index + 1) if gradient is None else gradient
                gradient, rows_of = _back_one(walk, index, taken[index], weight, gradient)
            fisher |= rows_of
        walk.progress("statistics", 2 * blocks - index, 2 * blocks)
    return fisher


def _gradient(walk: Walk, index: int) -> Tensor:
    """The gradient before block `index`, as far as an earlier run came; else that of the loss, after the last block."""
    if index < len(walk.base) or walk.work.find(_gradient_before(index)):
        found = walk.work.read(_gradient_before(index))
        walk.stream.resize(found.told["sizes"])
        return found.tensors["gradient"].to(walk.base.device, copy=True)
    walk.bring(index)
    gradient = walk.stream.loss_gradient()
    _finish_gradient(walk, index, gradient)
    walk.work.drop(hidden_before(index))
    return gradient


def _back_one(
    walk: Walk, index: int, taken: BlockStatistics, weight: float, gradient: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The gradient before block `index` from the one after it, and the Fisher information of the block."""
    hidden = walk.work.read(hidden_before(index)).tensors["hidden"].to(walk.base.device)
    with walk.base.block(index) as block:
        with FisherRecorder(block, taken.writers) as recorder:
            gradient = walk.stream.backward(index, block, hidden, gradient, again=recorder.clear)
        fisher = recorder.fisher(weight, walk.base.architecture.blocks[index])
    _finish_gradient(walk, index, gradient)
    walk.finish(_fisher_of(index), tensors=fisher)
    walk.work.drop(_gradient_before(index + 1), hidden_before(index))
    return gradient, fisher


def _finish_gradient(walk: Walk, index: int, gradient: Tensor) -> None:
    walk.finish(_gradient_before(index), tensors={"gradient": gradient}, told={"sizes": walk.stream.sizes})


def _allocate(walk: Walk, taken: list[BlockStatistics], fisher: Fisher) -> list[RowZeros]:
    """Block by block, how many weights of each row of each of its linears go."""
    threshold = Threshold()
    for index, statistics in enumerate(taken):
        if not walk.work.find(_prices_of(index)):
            with walk.clock.measure("solve"):
                _write_prices(walk, index, statistics, fisher)
        for one in _prices(walk, index, statistics).values():
            threshold.count(one)
    threshold.settle()
    zeros: list[RowZeros] = []
    for index, statistics in enumerate(taken):
        zeros.append({name: threshold.zeros(one) for name, one in _prices(walk, index, statistics).items()})
    return from_main(zeros)


def _write_prices(walk: Walk, index: int, statistics: BlockStatistics, fisher: Fisher) -> None:
    """Lay the prices of block `index` aside."""
    name, weights = walk.base.architecture.blocks[index], walk.base.weights(index)
    tensors, uniform = dict[str, Tensor](), dict[str, int]()
    for group, linears in statistics.groups.items():
        for linear in linears:
            rows = fisher[f"{name}.{linear}"]
            found = row_prices(weights[linear], rows, statistics.squares[group], walk.prune)
            tensors |= {f"{linear}:counts": found.counts, f"{linear}:prices": found.prices}
            uniform[linear] = found.uniform
    walk.work.write(_prices_of(index), tensors, {"uniform": uniform})


def _prices(walk: Walk, index: int, statistics: BlockStatistics) -> dict[str, Prices]:
    """The prices of block `index`, in the order in which its linears run."""
    part = walk.work.read(_prices_of(index))
    return {
        linear: Prices(part.tensors[f"{linear}:counts"], part.tensors[f"{linear}:prices"], part.told["uniform"][linear])
        for linears in statistics.groups.values()
        for linear in linears
    }


def _of_block(index: int, tensors: Mapping[str, Tensor]) -> RowZeros:
    prefix = f"{index}:"
    return {name.removeprefix(prefix): rows for name, rows in tensors.items() if name.startswith(prefix)}


def _steps(walk: Walk) -> int:
    """How often progress is told: at every block, forward and back."""
    return len(walk.base) * (1 if walk.weight is None else 2)


def _gradient_before(index: int) -> str:
    return f"gradient-{index:05d}"


def _fisher_of(index: int) -> str:
    return f"fisher-{index:05d}"


def _prices_of(index: int) -> str:
    return f"prices-{index:05d}"
