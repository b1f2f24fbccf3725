"""What has to be known of all blocks before the first one is pruned, where the loss decides (criterion `loss`).

    forward      take the statistics of every block, and keep what each block reads
    back         bring the gradient of the loss back block by block: the Fisher information of outputs
    allocation   one threshold over the whole model: the zeros of each row

What a block reads is kept on disk beside the step's output until the way back: a model may be larger than memory, and
so may the hidden states of all its blocks.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from copal.allocation import Prices, RowZeros, Threshold, row_prices
from copal.checkpoint import save_shard
from copal.errors import StateError
from copal.fisher import Fisher, FisherRecorder, add_fisher
from copal.processes import from_main
from copal.walk import BlockStatistics, Walk, take_statistics

__all__ = ["survey"]


def survey(walk: Walk) -> list[BlockStatistics]:
    """The statistics of every block, without their moments, which are written to the state, and with their zeros.

    Raises:
        NumericsError, ResourceError, StateError: see `copal.step.prune_step`.
    """
    walk.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=walk.scratch, prefix=".survey-") as folder:
        with walk.clock.measure("statistics"):
            taken, fisher = _forth_and_back(walk, Path(folder))
        if walk.prune.pattern:
            return taken
        with walk.clock.measure("solve"):
            zeros = _allocate(walk, taken, fisher, Path(folder))
    return [replace(statistics, zeros=rows) for statistics, rows in zip(taken, zeros, strict=True)]


def _forth_and_back(walk: Walk, folder: Path) -> tuple[list[BlockStatistics], Fisher]:
    """The statistics of all blocks without their moments, which are on disk, and the Fisher information of all."""
    taken, steps = [], len(walk.base) * (1 if walk.weight is None else 2)
    for index in range(len(walk.base)):
        if walk.weight is not None:
            save_shard(_file(folder, index), {"hidden": walk.stream.hidden.cpu()})
        taken.append(take_statistics(walk, index).without_moments())
        walk.progress("statistics", index + 1, steps)
    new = _back(walk, taken, folder, walk.weight) if walk.weight is not None else None
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
    return taken, total


def _back(walk: Walk, taken: list[BlockStatistics], folder: Path, weight: float) -> Fisher:
    """The new domain's Fisher information."""
    gradient, fisher = walk.stream.loss_gradient(), dict[str, Tensor]()
    blocks = len(walk.base)
    for index in reversed(range(blocks)):
        file = _file(folder, index)
        hidden = load_file(file)["hidden"].to(walk.base.device)
        file.unlink()
        with walk.base.block(index) as block:
            with FisherRecorder(block, taken[index].writers) as recorder:
                gradient = walk.stream.backward(index, block, hidden, gradient, again=recorder.clear)
            fisher |= recorder.fisher(weight, walk.base.architecture.blocks[index])
        walk.progress("statistics", 2 * blocks - index, 2 * blocks)
    return fisher


def _allocate(walk: Walk, taken: list[BlockStatistics], fisher: Fisher, folder: Path) -> list[RowZeros]:
    """Block by block, how many weights of each row of each of its linears go."""
    threshold, kinds = Threshold(), list[dict[str, Prices]]()
    for index, name in enumerate(walk.base.architecture.blocks):
        weights, found = walk.base.weights(index), {}
        for group, linears in taken[index].groups.items():
            for linear in linears:
                rows = fisher[f"{name}.{linear}"]
                found[linear] = row_prices(weights[linear], rows, taken[index].squares[group], walk.prune)
                threshold.count(found[linear])
        save_shard(_file(folder, index), {linear: one.prices for linear, one in found.items()})
        kinds.append({linear: replace(one, prices=one.prices[:0]) for linear, one in found.items()})
    threshold.settle()
    zeros: list[RowZeros] = []
    for index, found in enumerate(kinds):
        prices = load_file(_file(folder, index))
        zeros.append({name: threshold.zeros(replace(one, prices=prices[name])) for name, one in found.items()})
    return from_main(zeros)


def _file(folder: Path, index: int) -> Path:
    return folder / f"block-{index:05d}.safetensors"
