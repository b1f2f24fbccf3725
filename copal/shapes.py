"""What a model is made of, from its config.json alone: no weight is read, and none is made.

The model's own code runs on fake tensors, which have shapes and no contents. So linears with a common input are found
as a step finds them, operations are counted as they come by, and what a block keeps in memory is what its code keeps:
nothing here knows one architecture from another.

Shapes: N windows, B windows of a batch, L tokens of a window, H hidden size, V vocabulary, O out and I in features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from copal.architecture import Architecture, find_linears, hidden_states, load_shapes, shape_of
from copal.checkpoint import Checkpoint
from copal.config import CalibrationConfig, PruneConfig
from copal.errors import ModelError
from copal.experts import Experts
from copal.fisher import FisherRecorder
from copal.foreign import plainly
from copal.meter import Meter
from copal.recorder import MomentRecorder

__all__ = ["BlockShape", "Group", "ModelShape", "StepSettings", "model_shape"]

_MOST = 100_000  # parameter tensors; mixtures of hundreds of experts have half as many


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSettings:
    """What decides beside the model how large a step is.

    Attributes:
        domains: of the version that comes out; with more than one the parent is a pruned version.
        dtype: of the forward pass.
        batch, processes, nodes: as in params.yaml: each of the nodes has so many processes.
        on_gpu: whether each process has a GPU.
        resumes: whether it keeps what it goes on from if it is killed (`copal.resume`).
    """

    calibration: CalibrationConfig
    prune: PruneConfig
    domains: int
    dtype: torch.dtype
    batch: int = 8
    processes: int = 1
    nodes: int = 1
    on_gpu: bool = False
    resumes: bool = False

    @property
    def windows(self) -> int:
        """N of one process."""
        return -(-self.calibration.windows // (self.processes * self.nodes))

    @property
    def has_parent(self) -> bool:
        """Whether a pruned version comes before."""
        return self.domains > 1

    @property
    def by_loss(self) -> bool:
        """Whether there is a way back."""
        return self.prune.criterion == "loss"

    @property
    def by_gradient(self) -> bool:
        """Whether there is an accumulator as large as the model."""
        return self.prune.criterion == "gradient"


@dataclass(frozen=True, slots=True)
class Group:
    """Linears that read the same input.

    Attributes:
        outputs: O of each.
        inputs: I of all.
    """

    outputs: tuple[int, ...]
    inputs: int

    @property
    def weights(self) -> int:
        """Of all its linears."""
        return sum(self.outputs) * self.inputs


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockShape:
    """Decoder blocks of one kind.

    Attributes:
        count: how many of them the model has.
        parameters: of one; norms, biases and routers are among them.
        groups: in the order in which they run.
        forward: operations of one window; a multiplication and its addition are two.
        statistics: the same while statistics are taken, where experts read all tokens.
        backward: from the gradient after the block to the one before it, without the forward that comes first.
        forward_moved, backward_moved: bytes that go through memory beside products, likewise.
        held: most bytes of one batch while statistics are taken, the inputs of all groups among them.
        held_back: the same on the way back.
    """

    count: int
    parameters: int
    groups: tuple[Group, ...]
    forward: int
    statistics: int
    backward: int
    forward_moved: int
    backward_moved: int
    held: int
    held_back: int

    @property
    def weights(self) -> int:
        """Of all linears of one block."""
        return sum(group.weights for group in self.groups)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """A causal language model.

    Attributes:
        parameters: tied ones count once.
        stored: bytes of a parameter in the checkpoint.
        size: bytes of the checkpoint.
        hidden, vocabulary: H and V.
        blocks: each kind of them.
        outside, outside_moved: operations outside the blocks for one window, those of the head, and bytes moved.
        held_outside: most bytes of one window outside the blocks, its logits among them.
    """

    parameters: int
    stored: int
    size: int
    hidden: int
    vocabulary: int
    blocks: tuple[BlockShape, ...]
    outside: int
    outside_moved: int
    held_outside: int

    @property
    def block_count(self) -> int:
        """How many blocks there are."""
        return sum(kind.count for kind in self.blocks)

    @property
    def weights(self) -> int:
        """Of the linears that are pruned."""
        return sum(kind.count * kind.weights for kind in self.blocks)

    @property
    def outputs(self) -> int:
        """O of all linears that are pruned."""
        return sum(kind.count * sum(sum(group.outputs) for group in kind.groups) for kind in self.blocks)

    @property
    def outside_parameters(self) -> int:
        """Parameters that belong to no block."""
        return self.parameters - sum(kind.count * kind.parameters for kind in self.blocks)


def model_shape(folder: Path, settings: StepSettings) -> ModelShape:
    """Look at the model in `folder`; config.json is enough, and weights that lie there tell how large they are.

    Raises:
        ModelError: `folder` holds no causal language model, or none that copal can take apart.
    """
    model = load_shapes(folder, _MOST)
    parameters = int(model.num_parameters())
    stored, size = _stored(folder, model)
    with plainly(f"the shapes that {folder / 'config.json'} asks for do not fit one another"):
        kinds, calls, outside, vocabulary = _run_fake(model, settings)
    return ModelShape(
        parameters=parameters,
        stored=stored,
        size=parameters * stored if size is None else size,
        hidden=next(iter(calls.values())).hidden.shape[-1],
        vocabulary=vocabulary,
        blocks=kinds,
        outside=outside.operations.total(),
        outside_moved=outside.moved,
        held_outside=outside.most,
    )


def _run_fake(
    model: PreTrainedModel, settings: StepSettings
) -> tuple[tuple[BlockShape, ...], dict[nn.Module, _Call], Meter, int]:
    """Each kind of block; what each block is handed; operations and memory outside the blocks; V."""
    model.to(settings.dtype)
    batch, length = min(settings.batch, settings.windows), settings.calibration.window_length
    blocks = [model.get_submodule(name) for name in Architecture.of(model).blocks]
    kinds: dict[Any, list[nn.Module]] = {}
    for block in blocks:
        shapes = tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())
        kinds.setdefault((type(block), shapes), []).append(block)
    idle = {module for kind in kinds.values() for block in kind[1:] for module in block.modules()}
    with FakeTensorMode(allow_non_fake_inputs=True):  # what does not run may stay on the meta device
        for module in model.modules():
            if module not in idle:
                module.to_empty(device="cpu", recurse=False)
        for experts in [module for module in model.modules() if isinstance(module, Experts)]:
            _route_evenly(experts)
        calls, outside, vocabulary = _run_model(model, blocks, torch.zeros(batch, length, dtype=torch.long))
        found = [_look_at(kind[0], len(kind), calls[kind[0]], batch, settings.by_gradient) for kind in kinds.values()]
    return tuple(found), calls, outside, vocabulary


@dataclass(frozen=True, slots=True)
class _Call:
    """What a model hands one of its blocks."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def hidden(self) -> Tensor:
        """Hidden states (B, L, H)."""
        found: Tensor = self.args[0] if self.args else self.kwargs["hidden_states"]
        return found


def _run_model(
    model: PreTrainedModel, blocks: list[nn.Module], tokens: Tensor
) -> tuple[dict[nn.Module, _Call], Meter, int]:
    """What each block is handed; operations and memory of one window outside the blocks; V.

    Only the first block runs, the others give what it gave; then none does.
    """
    calls: dict[nn.Module, _Call] = {}
    given: list[Any] = []

    def see(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[block] = _Call(args, kwargs)

    def give(*_: Any, **__: Any) -> Any:
        return given[0]

    hooks = [block.register_forward_pre_hook(see, with_kwargs=True) for block in blocks]
    hooks.append(blocks[0].register_forward_hook(lambda _, __, output: given.append(output)))
    for block in blocks[1:]:
        block.forward = give
    with torch.no_grad():
        model(tokens, use_cache=False)
        for hook in hooks:
            hook.remove()
        given[0] = _first_window(given[0])
        blocks[0].forward = give
        with Meter() as meter:
            logits = model(tokens[:1], use_cache=False).logits
    for block in blocks:
        del block.forward
    return calls, meter, logits.shape[-1]


def _first_window(output: Any) -> Any:
    """What a block would have given for one window."""
    return (output[0][:1], *output[1:]) if isinstance(output, tuple) else output[:1]


def _look_at(block: nn.Module, count: int, call: _Call, batch: int, gradient: bool) -> BlockShape:
    """Run a block as a step does: to take statistics, and under autograd."""
    with torch.no_grad(), MomentRecorder(block, gradient=gradient) as recorder, Meter() as taking:
        block.forward(*call.args, **call.kwargs)  # past the hook that adds up when a block has run
    hidden = call.hidden.requires_grad_()
    with FisherRecorder(block, ()), Meter() as running:
        output = hidden_states(block(*call.args, **call.kwargs))
        forward, moved = running.operations.total(), running.moved
        torch.autograd.grad(output, hidden, torch.empty_like(output))
    linears = find_linears(block)
    shapes = {name: shape_of(linear) for name, linear in linears.items()}
    return BlockShape(
        count=count,
        parameters=sum(parameter.numel() for parameter in block.parameters()),
        groups=tuple(
            Group(tuple(shapes[name][0] for name in names), shapes[group][1])
            for group, names in recorder.groups().items()
        ),
        forward=forward // batch,
        statistics=taking.operations.total() // batch,
        backward=(running.operations.total() - forward) // batch,
        forward_moved=moved // batch,
        backward_moved=(running.moved - moved) // batch,
        held=taking.most,
        held_back=running.most,
    )


def _route_evenly(experts: Experts) -> None:
    """Let each expert read its even share of the tokens: which ones, nobody can tell of tokens without contents."""

    def shares(top_k_index: Tensor) -> list[int]:
        routed, number = top_k_index.numel(), len(experts)
        return [routed // number + (place < routed % number) for place in range(number)]

    def forward(states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        output = torch.zeros_like(states)
        for expert, tokens in zip(experts, shares(top_k_index), strict=True):
            rows = torch.arange(tokens)
            routed = expert(states[rows], rows) * top_k_weights[rows, 0, None]
            output.index_add_(0, rows, routed.to(output.dtype))
        return output

    def others(top_k_index: Tensor) -> list[Tensor]:
        return [torch.arange(len(top_k_index) - tokens) for tokens in shares(top_k_index)]

    experts.forward = forward  # type: ignore[assignment, method-assign]
    experts.others = others  # type: ignore[method-assign]


def _stored(folder: Path, model: PreTrainedModel) -> tuple[int, int | None]:
    """Bytes of a parameter, and of all files, of the weights in `folder`; without any, as config.json says, else 2."""
    try:
        weights = Checkpoint(folder)
    except ModelError:
        return int(getattr(model.config.dtype, "itemsize", 2)), None
    files = {stored.file for stored in weights.stored.values()}
    return weights.dtype(weights.names()[0]).itemsize, sum((folder / file).stat().st_size for file in files)
