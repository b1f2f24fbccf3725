"""Walk a checkpoint block by block: only one decoder block has its weights in memory.

The model's own forward does the work before the first block (embeddings, positions, masks) and after the last one
(norm, head): the blocks' forwards are replaced for those two calls, so no architecture's forward is written again here.

Shapes: N windows, B windows of a batch, L tokens of a window, H hidden size, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from copal.architecture import Architecture, as_rows, hidden_states, load_skeleton, names_in_model, shape_of, tie
from copal.checkpoint import Checkpoint
from copal.embeddings import RowsThere
from copal.errors import ModelError, NumericsError, SmallerBatchWarning
from copal.labels import loss_gradient
from copal.out_of_memory import memory_error, memory_for, trim_heap
from copal.processes import device as own_device

__all__ = ["Stream", "StreamedModel", "compute_dtype", "place"]


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the forward pass: `bfloat16`, `float32`, or `auto` for what this machine multiplies fastest."""
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    has_bfloat16_products = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_bfloat16_products else torch.float32


def place(device: torch.device | None, dtype: torch.dtype | None) -> tuple[torch.device, torch.dtype]:
    """Where and how to compute; None: this process's own GPU or else the CPU, and what that multiplies fastest."""
    device = device or own_device()
    return device, dtype or compute_dtype("auto", device)


@dataclass(frozen=True, slots=True)
class _Call:
    """What the model's forward hands a block beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _TupleWantedError(Exception):
    """A model took element 0 of what its block returned: its blocks return tuples."""


class _LastBlockError(Exception):
    """A model has called its last block: what comes after, a head as wide as the vocabulary, is not wanted."""


class StreamedModel:
    """A causal language model whose blocks are read when they run.

    Embeddings, last norm and head stay in memory; a block is there only inside `with model.block(i)`.
    """

    def __init__(self, folder: Path, *, device: torch.device, dtype: torch.dtype) -> None:
        self.folder, self.device, self.dtype = folder, device, dtype
        self.model = load_skeleton(folder)
        self.architecture = Architecture.of(self.model)
        self.checkpoint = Checkpoint(folder)
        self._name_of = names_in_model(self.model, self.checkpoint.names())
        self._stored = {name: stored for stored, name in self._name_of.items()}
        self._blocks = [self.model.get_submodule(name) for name in self.architecture.blocks]
        self._returns_tuple = False
        inside = tuple(f"{name}." for name in self.architecture.blocks)
        parameters = self.model.named_parameters(remove_duplicate=False)  # config.json alone has tied some of them
        outside = {name for name, _ in parameters if not name.startswith(inside)}
        ties = self.model.all_tied_weights_keys
        absent = outside & {*ties, *ties.values()} - self._stored.keys()
        self._load(self.model, {name: self.stored_name(name) for name in sorted(outside - absent)})
        for name in tie(self.model, absent):
            raise ModelError(f"{folder} has no tensor {name}")
        stored_buffers = self.model.state_dict().keys() & self._stored.keys()  # the rest is made anew, never stored
        for name, buffer in list(self.model.named_buffers()):
            stored = self.stored_name(name)
            value = self.checkpoint.read([stored])[stored] if name in stored_buffers else buffer
            set_module_tensor_to_device(self.model, name, device, value=value, dtype=buffer.dtype)

    def __len__(self) -> int:
        return len(self._blocks)

    def stored_name(self, name: str) -> str:
        """The checkpoint's name of parameter `name`; `name` itself where the checkpoint does not hold it."""
        return self._stored.get(name, name)

    def stored_block(self, index: int) -> list[str]:
        """The checkpoint's names of all tensors of block `index`."""
        prefix = f"{self.architecture.blocks[index]}."
        return [stored for stored, name in self._name_of.items() if name.startswith(prefix)]

    def stored_outside(self) -> list[str]:
        """The checkpoint's names of all tensors that belong to no block."""
        in_blocks = {name for index in range(len(self)) for name in self.stored_block(index)}
        return [name for name in self.checkpoint.names() if name not in in_blocks]

    def weights(self, index: int, source: Checkpoint | Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The weights of the linears of block `index`, each (O, I) float32 on the device.

        `source`: another checkpoint of the same model, or its tensors by the checkpoint's names.
        """
        trim_heap()
        stored = {linear: self._stored_weight(index, linear) for linear in self.architecture.linears[index]}
        source = source if source is not None else self.checkpoint
        tensors = source.read(list(stored.values())) if isinstance(source, Checkpoint) else source
        return {  # a GPU converts what it has got: 16 bits come over the bus, not 32
            linear: as_rows(self._linear(index, linear), tensors[name]).to(self.device).float()
            for linear, name in stored.items()
        }

    def shapes(self, index: int) -> dict[str, tuple[int, int]]:
        """(O, I) of each linear of block `index`."""
        return {linear: shape_of(self._linear(index, linear)) for linear in self.architecture.linears[index]}

    def stored_weights(self, index: int, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `weights`: by the checkpoint's names, as it lays them out, in its dtype, on the CPU."""
        stored = {}
        for linear, rows in weights.items():
            name = self._stored_weight(index, linear)
            laid_out = as_rows(self._linear(index, linear), rows)
            stored[name] = laid_out.to("cpu", self.checkpoint.dtype(name)).contiguous()
        return stored

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Block `index` with its weights on the device; they are dropped on leaving."""
        block, prefix = self._blocks[index], self.architecture.blocks[index]
        names = {name: self.stored_name(f"{prefix}.{name}") for name, _ in block.named_parameters()}
        trim_heap()
        self._load(block, names)
        try:
            yield block
        finally:
            for name in names:
                set_module_tensor_to_device(block, name, "meta")
            trim_heap()

    def start(self, windows: Tensor, batch: int) -> Stream:
        """Embed `windows` (N, L) and stop before the first block."""
        return Stream(self, windows, batch)

    def _linear(self, index: int, linear: str) -> nn.Module:
        module: nn.Module = self._blocks[index].get_submodule(linear)
        return module

    def _stored_weight(self, index: int, linear: str) -> str:
        return self.stored_name(f"{self.architecture.blocks[index]}.{linear}.weight")

    def _load(self, module: nn.Module, stored_names: dict[str, str]) -> None:
        tensors = self.checkpoint.read(list(stored_names.values()))
        for name, stored in stored_names.items():
            shape = module.get_parameter(name).shape
            if tensors[stored].shape != shape:
                found = tuple(tensors[stored].shape)
                raise ModelError(f"{self.folder}: {stored} has shape {found}, config.json wants {tuple(shape)}")
            set_module_tensor_to_device(module, name, self.device, value=tensors[stored], dtype=self.dtype)

    @contextmanager
    def _forwards(self, forwards: list[Callable[..., Any]]) -> Iterator[None]:
        for block, forward in zip(self._blocks, forwards, strict=True):
            block.forward = forward
        try:
            yield
        finally:
            for block in self._blocks:
                del block.forward

    def _record(self, tokens: Tensor) -> tuple[Tensor, list[_Call]]:
        """Embeddings (B, L, H) of `tokens` and each block's other arguments, from the model's own forward."""
        hidden: list[Tensor] = []
        calls: list[_Call] = []

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if hidden and hidden_states.shape != hidden[0].shape:
                raise _TupleWantedError
            hidden.append(hidden_states)
            calls.append(_Call(args, kwargs))
            if len(calls) == len(self):
                raise _LastBlockError
            return (hidden_states,) if self._returns_tuple else hidden_states

        try:
            with suppress(_LastBlockError), self._forwards([forward] * len(self)), RowsThere(self.folder, tokens):
                self.model(tokens, use_cache=False)
        except _TupleWantedError:
            self._returns_tuple = True
            return self._record(tokens)
        return hidden[0], calls

    def _logits(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """Logits (B, L, V) from the last block's output `hidden` (B, L, H), by the model's own norm and head."""

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return (hidden,) if self._returns_tuple else hidden

        with self._forwards([forward] * len(self)):
            logits: Tensor = self.model(tokens, use_cache=False).logits
        return logits


class Stream:
    """The hidden states of some windows on their way through a StreamedModel.

    Raises:
        NumericsError: hidden states are not finite; says after which block and where in it.
        ResourceError: memory is not enough for one window at a time.
    """

    def __init__(self, model: StreamedModel, windows: Tensor, batch: int) -> None:
        self._model = model
        self._tokens = list(torch.split(windows.to(model.device), batch))
        self._hidden: list[Tensor] = []
        self._calls: dict[int, list[_Call]] = {}  # they depend on the size of a batch only
        self._next = 0
        with torch.no_grad(), memory_for(f"the embeddings of {batch} windows at a time"):
            for tokens in self._tokens:
                hidden, calls = model._record(tokens)
                if not hidden.isfinite().all():
                    raise NumericsError(f"{model.folder}: the embeddings hold NaN or infinity")
                self._hidden.append(hidden)
                self._calls.setdefault(len(tokens), calls)

    def advance(self, block: nn.Module, again: Callable[[], None] = lambda: None) -> None:
        """Run every batch through `block`, the next one of the model; anew with half of the batch if memory runs out.

        `again` is called before it runs anew: what was recorded of it is to be forgotten.
        """
        while (hidden := self._run(block)) is None:
            again()
            self._halve(self._next)
        self._hidden = hidden
        self._next += 1

    def go_on(self, index: int, hidden: Tensor, sizes: Sequence[int]) -> None:
        """Be before block `index` of the model (or after the last), with `hidden` (N, L, H) in batches of `sizes`."""
        self.resize(sizes)
        self._hidden = [part.to(self._model.device, copy=True) for part in torch.split(hidden, list(sizes))]
        self._next = index

    def resize(self, sizes: Sequence[int]) -> None:
        """Run so many windows at a time, batch by batch: rounding depends on it."""
        if list(sizes) != self.sizes:
            self._tokens = list(torch.split(torch.cat(self._tokens), list(sizes)))
            self._hidden = list(torch.split(torch.cat(self._hidden), list(sizes)))

    @property
    def next(self) -> int:
        """Index of the block that it is before; the number of blocks after the last one."""
        return self._next

    @property
    def sizes(self) -> list[int]:
        """Windows of each batch."""
        return [len(tokens) for tokens in self._tokens]

    @property
    def hidden(self) -> Tensor:
        """Hidden states (N, L, H) before the next block, or after the last one."""
        return torch.cat(self._hidden)

    @property
    def hidden_size(self) -> int:
        """H."""
        return self._hidden[0].shape[-1]

    def logits(self) -> Iterator[tuple[Tensor, Tensor]]:
        """After the last block: (tokens (1, L), logits (1, L, V)), a window at a time, since V is large."""
        with torch.no_grad():
            yield from ((window, logits) for window, _, logits in self._windows_logits())

    def loss_gradient(self) -> Tensor:
        """After the last block: the gradient (N, L, H), by hidden state, of each window's loss (`copal.labels`)."""
        gradients: list[Tensor] = []
        with torch.enable_grad():
            for window, hidden, logits in self._windows_logits():
                gradients += torch.autograd.grad(logits, hidden, loss_gradient(logits[0].detach(), window[0])[None])
        return torch.cat(gradients)

    def backward(
        self, index: int, block: nn.Module, hidden: Tensor, gradient: Tensor, again: Callable[[], None] = lambda: None
    ) -> Tensor:
        """The gradient (N, L, H) before block `index`, from the one after it; after the last block (see `advance`).

        The block runs once more, on the `hidden` (N, L, H) states that it read, with whatever hooks it has.
        """
        while (before := self._run_back(index, block, hidden, gradient)) is None:
            again()
            self._halve(index)
        return before

    def _windows_logits(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(tokens (1, L), hidden states (1, L, H) that they are of, logits (1, L, V)) of each window."""
        assert self._next == len(self._model)
        with memory_for("the logits of one window"):
            for tokens, states in zip(self._tokens, self._hidden, strict=True):
                for row in range(len(tokens)):
                    window, hidden = tokens[row : row + 1], states[row : row + 1].detach()
                    if torch.is_grad_enabled():
                        hidden.requires_grad_()
                    yield window, hidden, self._model._logits(window, hidden)

    def _run(self, block: nn.Module) -> list[Tensor] | None:
        """What `block` makes of every batch; None where memory ran out, and then nothing here has changed."""
        outputs = []
        try:
            with torch.no_grad():
                for tokens, hidden in zip(self._tokens, self._hidden, strict=True):
                    call = self._call(tokens, self._next)
                    output = hidden_states(block(hidden, *call.args, **call.kwargs))
                    if not output.isfinite().all():
                        raise NumericsError(self._where_not_finite(block, hidden, call))
                    outputs.append(output)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            return None  # tried again outside of this handler: the error keeps alive what filled the memory
        return outputs

    def _run_back(self, index: int, block: nn.Module, hidden: Tensor, gradient: Tensor) -> Tensor | None:
        """What `backward` gives; None where memory ran out."""
        sizes, before = self.sizes, list[Tensor]()
        # A GPU's fused kernels add up the gradient of attention in any order: a replay would have other bits.
        attention = sdpa_kernel(SDPBackend.MATH) if self._model.device.type == "cuda" else nullcontext()
        try:
            with torch.enable_grad(), attention:
                for tokens, states, dy in zip(
                    self._tokens, torch.split(hidden, sizes), torch.split(gradient, sizes), strict=True
                ):
                    call, x = self._call(tokens, index), states.detach().requires_grad_()
                    y = hidden_states(block(x, *call.args, **call.kwargs))
                    before += torch.autograd.grad(y, x, dy)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            return None
        return torch.cat(before)

    def _call(self, tokens: Tensor, index: int) -> _Call:
        """What the model hands block `index` for a batch like `tokens`."""
        if len(tokens) not in self._calls:
            with torch.no_grad():
                _, self._calls[len(tokens)] = self._model._record(tokens)
        return self._calls[len(tokens)][index]

    def _halve(self, index: int) -> None:
        where, before = self._model.architecture.blocks[index], max(map(len, self._tokens))
        if before == 1:
            raise memory_error(f"{where} with one window at a time")
        half = before // 2
        warnings.warn(
            f"memory ran out in {where} with {before} windows at a time, {half} are tried: "
            f"model.batch: {half} in the settings saves the attempt",
            SmallerBatchWarning,
            stacklevel=3,
        )
        self._tokens = [part for tokens in self._tokens for part in torch.split(tokens, half)]
        self._hidden = [part for hidden in self._hidden for part in torch.split(hidden, half)]
        self._calls = {}
        clear_device_cache()

    def _where_not_finite(self, block: nn.Module, hidden: Tensor, call: _Call) -> str:
        """Run `block` once more and look at what comes out of each module in it."""
        found: list[str] = []

        def look(name: str, output: Any) -> None:
            first = hidden_states(output)
            if isinstance(first, Tensor) and not first.isfinite().all():
                found.append(name)

        prefix = self._model.architecture.blocks[self._next]
        hooks = [
            module.register_forward_hook(lambda _, __, output, name=name: look(name, output))
            for name, module in block.named_modules(prefix=prefix)
        ]
        block(hidden, *call.args, **call.kwargs)
        for hook in hooks:
            hook.remove()
        return (
            f"{self._model.folder}: NaN or infinity comes out of {found[0]}: "
            f"check the weights of {prefix}, or set model.dtype to float32"
        )
