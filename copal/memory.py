"""The most memory that a step holds at one time: the largest of what its phases hold, tensor by tensor.

Each phase below is told as the code does it (`copal.walk`, `copal.solve`, `copal.state`, `copal.survey`): who changes
what is alive there changes it here, and `test_estimate.py` says so, for it measures real steps.

Shapes: N windows of a process, L tokens of a window, H hidden size, V vocabulary, O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from copal.evaluation import HIDDEN_BYTES
from copal.shapes import BlockShape, ModelShape, StepSettings

__all__ = ["Memory", "memory"]

_FLOAT = 4  # bytes of a float32


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Most bytes at one time, beside what Python and its libraries take.

    Attributes:
        host: of all processes of a node together.
        device: on each GPU; 0 without one.
    """

    host: int
    device: int


def memory(shape: ModelShape, settings: StepSettings) -> Memory:
    """What a step needs with these settings."""
    phases = [*_outside(shape, settings), *(held for kind in shape.blocks for held in _block(kind, shape, settings))]
    computing = shape.outside_parameters * settings.dtype.itemsize + int(max(phases))
    if settings.on_gpu:
        return Memory(host=settings.processes * _in_transit(shape, settings), device=computing)
    return Memory(host=settings.processes * computing, device=0)


def _hidden(shape: ModelShape, settings: StepSettings) -> int:
    """The hidden states of all calibration windows."""
    return settings.windows * settings.calibration.window_length * shape.hidden * settings.dtype.itemsize


def _outside(shape: ModelShape, settings: StepSettings) -> Iterator[int]:
    """Phases outside the blocks: evaluation, where logits become probabilities, and the head's gradient."""
    calibration, itemsize = settings.calibration, settings.dtype.itemsize
    words = calibration.window_length * shape.vocabulary
    window = calibration.window_length * shape.hidden * itemsize
    evaluated = settings.domains * calibration.evaluation_windows
    scored = -(-evaluated // (settings.processes * settings.nodes)) * window
    states = min(scored, HIDDEN_BYTES)  # and once more those of one domain
    yield states + shape.held_outside + 2 * _FLOAT * words
    again = min(states, calibration.evaluation_windows * window)
    yield from (states + again + kind.parameters * itemsize + kind.held for kind in shape.blocks)
    if settings.by_loss:
        yield 2 * _hidden(shape, settings) + shape.held_outside + itemsize * words


def _block(kind: BlockShape, shape: ModelShape, settings: StepSettings) -> Iterator[float]:
    """Phases of a block, in the order in which they come."""
    itemsize, hidden = settings.dtype.itemsize, _hidden(shape, settings)
    largest = _FLOAT * max(group.inputs for group in kind.groups) ** 2
    linear = _FLOAT * max(rows * group.inputs for group in kind.groups for rows in group.outputs)
    weights, block = _FLOAT * kind.weights, kind.parameters * itemsize
    moments = _FLOAT * sum(group.inputs**2 for group in kind.groups) + (weights if settings.by_gradient else 0)
    # The windows run: hidden states before and after, sums, activations; then the sums are added to.
    tokens = min(settings.batch, settings.windows) * settings.calibration.window_length
    inputs = tokens * itemsize * sum(group.inputs for group in kind.groups)
    weighted = tokens * max(group.inputs for group in kind.groups) * (_FLOAT if itemsize == _FLOAT else 2 * _FLOAT + 2)
    yield 2 * hidden + block + moments + max(kind.held, inputs + weighted + largest // 4)
    if settings.resumes:  # what the next block reads is laid aside: put together, and as bytes
        yield 3 * hidden
    # Moments are packed and unpacked; those of the parent are read and added; the sum is folded.
    yield hidden + 2 * largest + (3.5 if settings.has_parent else 2.25) * moments
    if settings.by_loss:
        # Back: what the blocks read, the gradients behind and before, once more while they are put together.
        yield 4 * hidden + max(block + kind.held_back, hidden)
        yield hidden + weights + 3 * linear
    # The solve: moments new, old and in sum, dense weights, those that are solved already; then its own matrices.
    moments *= 3 if settings.has_parent else 1
    solved = 0
    for group in kind.groups:
        rows, square = _FLOAT * group.weights, _FLOAT * group.inputs**2
        half = itemsize / _FLOAT
        own = rows * (9.25 + half + (2 if settings.by_gradient else 0)) + square * (3 if half == 1 else 3 + half)
        yield hidden + moments + weights + solved + own
        solved += rows
    # The report: weights dense, solved, as they are stored, and the parent's.
    sides = 2 + (shape.stored != _FLOAT) + settings.has_parent
    yield hidden + moments + sides * weights + 3 * linear + largest * (2 if settings.has_parent else 1)


def _in_transit(shape: ModelShape, settings: StepSettings) -> int:
    """What passes through memory on its way to and from a GPU: the largest of it, twice."""
    block = max(kind.parameters for kind in shape.blocks) * shape.stored
    moments = max(_FLOAT * sum(group.inputs**2 for group in kind.groups) for kind in shape.blocks)
    return 2 * max(block, moments, _hidden(shape, settings), shape.outside_parameters * shape.stored)
