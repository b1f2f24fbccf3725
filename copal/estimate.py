"""What a step takes, before it runs: memory, disk and operations, from shapes and settings alone.

Disk is exact but for the headers of files. Operations are those of the matrix products, as they run; what goes through
memory element by element beside them is counted roughly. `copal.memory` has the memory. Tests hold all of it to steps.

Shapes: N windows, L tokens of a window, H hidden size, V vocabulary, O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from copal.hardware import Hardware
from copal.memory import Memory, memory
from copal.packing import block_bytes, ranks
from copal.recorder import product_operations
from copal.shapes import BlockShape, Group, ModelShape, StepSettings, model_shape

__all__ = ["Disk", "Estimate", "Work", "estimate", "estimate_step", "seconds"]

_FLOAT = 4  # bytes of a float32
# Of float32 matrices as large as the weights, read or written element by element: in an iteration of the solve, in what
# a round does beside them (scores, sorting, the first residual), and by a report.
_ITERATION, _ROUND, _REPORT = 22, 60, 20
_FILES = 1e9  # bytes of files that are read, written or hashed in a second
_LOGITS = (
    24  # of float32 matrices as large as a window's logits: from these to the loss, where an exponential is several
)
_MERGE = 40  # of float32 matrices as large as the second moments, while a domain's are packed, unpacked and added


@dataclass(frozen=True, kw_only=True, slots=True)
class Disk:
    """Bytes.

    Attributes:
        model, contribution, total: of the new version: its weights, its domain's statistics, and the running sum.
        hidden: what every block reads, kept until the way back (criterion `loss`).
        newest: hidden states, or their gradient, that a killed step goes on from: those of the last block, and those of
            the one before it until they are written.
    """

    model: int
    contribution: int
    total: int
    hidden: int
    newest: int

    @property
    def version(self) -> int:
        """What stays of the step; `copal gc` frees the running sum once there is a newer one."""
        return self.model + self.contribution + self.total

    @property
    def most(self) -> int:
        """Most that the step's own folder takes at one time: what every block reads goes before the model comes."""
        return self.contribution + self.total + max(self.model, self.hidden) + self.newest


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be done, by all processes together.

    Attributes:
        half: operations of products in the dtype of the forward pass; a multiplication and its addition are two.
        single: operations of products in float32.
        moved: bytes that go through memory element by element, about.
    """

    half: int = 0
    single: int = 0
    moved: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.half + other.half, self.single + other.single, self.moved + other.moved)

    def __mul__(self, times: int) -> Work:
        return Work(self.half * times, self.single * times, self.moved * times)


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What a step takes; see the classes of its parts.

    Attributes:
        work: part of the step -> what is to be done, in the order in which they run.
        files: bytes that are read, written and hashed.
    """

    disk: Disk
    memory: Memory
    work: Mapping[str, Work]
    files: int


def estimate_step(folder: Path, settings: StepSettings) -> Estimate:
    """What a step on the model in `folder` takes; config.json is enough.

    Raises:
        ModelError: see `copal.shapes.model_shape`.
    """
    return estimate(model_shape(folder, settings), settings)


def estimate(shape: ModelShape, settings: StepSettings) -> Estimate:
    """What a step takes; `shape` was looked at with the same `settings`."""
    disk = _disk(shape, settings)
    return Estimate(
        disk=disk,
        memory=memory(shape, settings),
        work=_work(shape, settings),
        files=_files(disk, shape.block_count, settings),
    )


def seconds(found: Estimate, hardware: Hardware, devices: int = 1) -> dict[str, float]:
    """About how long each part takes, on so many devices; `files` at a Gigabyte a second.

    Products and what goes through memory are taken to come one after the other.
    """
    parts = {
        part: (work.half / hardware.half + work.single / hardware.single + work.moved / hardware.moved) / devices
        for part, work in found.work.items()
    }
    return {**parts, "files": found.files / _FILES}


# --- disk


def _disk(shape: ModelShape, settings: StepSettings) -> Disk:
    own = sum(kind.count * _contribution(kind, shape, settings) for kind in shape.blocks)
    total = sum(kind.count * _sum(kind, settings) for kind in shape.blocks)
    fisher = _FLOAT * shape.outputs if settings.by_loss else 0
    reads = settings.calibration.windows * settings.calibration.window_length * shape.hidden * settings.dtype.itemsize
    return Disk(
        model=shape.size,
        contribution=own + fisher,
        total=total + fisher,
        hidden=shape.block_count * reads if settings.by_loss else 0,
        newest=2 * reads if settings.resumes else 0,
    )


def _contribution(kind: BlockShape, shape: ModelShape, settings: StepSettings) -> int:
    """Bytes of a block's contribution: what `copal.state.contribution_tensors` gives."""
    size = sum(_FLOAT * group.inputs + 8 for group in kind.groups)  # the diagonal and the weight
    if settings.calibration.storage == "compact":
        size += sum(group.inputs * rank // 2 + _FLOAT * rank for group, rank in _ranks(kind, shape))
    else:
        size += sum(2 * _folded(group.inputs) for group in kind.groups)
    return size + (2 * kind.weights if settings.by_gradient else 0)


def _ranks(kind: BlockShape, shape: ModelShape) -> list[tuple[Group, int]]:
    """Each group of a block with its rank in compact storage."""
    groups = {str(place): (sum(group.outputs), group.inputs) for place, group in enumerate(kind.groups)}
    found = ranks(groups, block_bytes(shape.parameters, shape.block_count))
    return list(zip(kind.groups, found.values(), strict=True))


def _sum(kind: BlockShape, settings: StepSettings) -> int:
    """Bytes of a block's running sum."""
    size = sum(_FLOAT * (group.inputs + _folded(group.inputs)) + 8 for group in kind.groups)
    return size + (_FLOAT * kind.weights if settings.by_gradient else 0)


def _folded(inputs: int) -> int:
    """Numbers in a folded (I, I) matrix, see `copal.packing.fold`."""
    return 2 * ((inputs + 1) // 2) ** 2


def _work(shape: ModelShape, settings: StepSettings) -> dict[str, Work]:
    calibration = settings.calibration
    scored = calibration.evaluation_windows * (settings.domains + (2 if settings.has_parent else 1))
    parts = {
        "statistics": _over(shape, lambda kind: _statistics(kind, settings) + _packing(kind, shape, settings)),
        "way back": _over(shape, lambda kind: _way_back(kind, settings))
        + _logits(shape, settings) * calibration.windows,
        "solve": _over(shape, lambda kind: _solve(kind, settings)),
        "report": _over(shape, lambda kind: _report(kind, settings)),
        "evaluation": _over(shape, lambda kind: Work(scored * kind.forward, 0, scored * kind.forward_moved))
        + _logits(shape, settings, back=False) * scored,
    }
    if not settings.by_loss:
        del parts["way back"]
    return parts


def _over(shape: ModelShape, work: Callable[[BlockShape], Work]) -> Work:
    """What is to be done for all blocks."""
    return sum((work(kind) * kind.count for kind in shape.blocks), Work())


def _statistics(kind: BlockShape, settings: StepSettings) -> Work:
    """The forward pass, and sums over tokens of products of what each group reads."""
    tokens = settings.calibration.windows * settings.calibration.window_length
    products = tokens * sum(product_operations(group.inputs, settings.dtype) for group in kind.groups)
    return Work(
        half=settings.calibration.windows * kind.statistics + products,
        single=2 * tokens * kind.weights if settings.by_gradient else 0,
        moved=settings.calibration.windows * kind.forward_moved
        + _MERGE * _FLOAT * sum(group.inputs**2 for group in kind.groups),
    )


def _way_back(kind: BlockShape, settings: StepSettings) -> Work:
    """The forward pass once more, and the gradient from the end of the block to its beginning."""
    once = Work(half=kind.forward + kind.backward, moved=kind.forward_moved + kind.backward_moved)
    return once * settings.calibration.windows


def _logits(shape: ModelShape, settings: StepSettings, *, back: bool = True) -> Work:
    """The head of one window, its probabilities in float32 and, where asked for, the gradient back."""
    probabilities = _LOGITS * _FLOAT * settings.calibration.window_length * shape.vocabulary
    return Work(half=shape.outside, moved=shape.outside_moved + probabilities) * (2 if back else 1)


def _packing(kind: BlockShape, shape: ModelShape, settings: StepSettings) -> Work:
    """What compact storage multiplies: low ranks are found in four iterations, and multiplied out when they are read.

    The orthogonalisations between them are not counted.
    """
    if settings.calibration.storage != "compact":
        return Work()
    reads = 2 if settings.by_loss else 1
    return Work(
        single=sum(
            2 * (4 + 1 + reads) * group.inputs**2 * rank + 4 * group.inputs * rank**2
            for group, rank in _ranks(kind, shape)
        )
    )


def _solve(kind: BlockShape, settings: StepSettings) -> Work:
    """Conjugate gradient in rounds: products of the weights with a group's correlations."""
    rounds, iterations = len(settings.prune.rounds), settings.prune.iterations
    passes = rounds * (iterations * _ITERATION + _ROUND) + (_ROUND if settings.by_loss else 0)
    product = _product(kind)
    return Work(half=rounds * iterations * product, single=(1 + rounds) * product, moved=passes * _FLOAT * kind.weights)


def _report(kind: BlockShape, settings: StepSettings) -> Work:
    """Layer errors and the response shift: the energy of a linear's output, two times or four."""
    times = 4 if settings.has_parent else 2
    return Work(single=times * _product(kind), moved=_REPORT * _FLOAT * kind.weights)


def _product(kind: BlockShape) -> int:
    """Operations of W G for all linears of a block."""
    return sum(2 * group.weights * group.inputs for group in kind.groups)


def _files(disk: Disk, blocks: int, settings: StepSettings) -> int:
    """Bytes of files: the base is read for statistics and solve, and again where the loss decides; evaluation reads
    three models; the version is written, hashed twice, and copied to where it stays. What a killed step goes on from is
    written and hashed at every block: hidden states, which are written in any case where the loss decides, and then the
    gradient too.
    """
    parent = disk.model + 2 * disk.total if settings.has_parent else 0
    again = 2 * (disk.model + disk.hidden) + disk.total + disk.contribution if settings.by_loss else 0
    evaluated = (3 if settings.has_parent else 2) * disk.model
    laid_aside = (3 if settings.by_loss else 2) * blocks * disk.newest // 2
    return 2 * disk.model + again + parent + evaluated + 5 * disk.version + laid_aside
