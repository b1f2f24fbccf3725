"""Walk a checkpoint block by block: only one decoder block has its weights in memory.

The model's own forward does the work before the first block (embeddings, positions, masks) and after the last one
(norm, head): the blocks' forwards are replaced for those two calls, so no architecture's forward is written again here.

Shapes: N windows, B windows of a batch, L tokens of a window, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn

from copal.architecture import Architecture, as_rows, load_skeleton
from copal.checkpoint import Checkpoint
from copal.errors import ModelError

__all__ = ["Stream", "StreamedModel", "compute_dtype"]


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the forward pass: `bfloat16`, `float32`, or `auto` for what this machine multiplies fastest."""
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    has_bfloat16_products = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_bfloat16_products else torch.float32


@dataclass(frozen=True, slots=True)
class _Call:
    """What the model's forward hands a block beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _TupleWantedError(Exception):
    """A model took element 0 of what its block returned: its blocks return tuples."""


class StreamedModel:
    """A causal language model whose blocks are read when they run.

    Embeddings, last norm and head stay in memory; a block is there only inside `with model.block(i)`.
    """

    def __init__(self, folder: Path, *, device: torch.device, dtype: torch.dtype) -> None:
        self.folder, self.device, self.dtype = folder, device, dtype
        self.model = load_skeleton(folder)
        self.architecture = Architecture.of(self.model)
        self.checkpoint = Checkpoint(folder)
        self._blocks = [self.model.get_submodule(name) for name in self.architecture.blocks]
        self._returns_tuple = False
        in_blocks = {id(parameter) for block in self._blocks for parameter in block.parameters()}
        outside = {
            name: self.stored_name(name)
            for name, parameter in self.model.named_parameters()  # a tied head is named once
            if id(parameter) not in in_blocks
        }
        self._load(self.model, outside)
        self.model.tie_weights()
        for buffer_name, buffer in list(self.model.named_buffers()):
            set_module_tensor_to_device(self.model, buffer_name, device, value=buffer)

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def parameters(self) -> int:
        """How many parameters the model has; tied ones count once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def stored_name(self, name: str) -> str:
        """The checkpoint's name of parameter `name`; some checkpoints leave the base model's prefix out."""
        bare = name.removeprefix(f"{self.model.base_model_prefix}.")
        return bare if name not in self.checkpoint and bare in self.checkpoint else name

    def stored_block(self, index: int) -> list[str]:
        """The checkpoint's names of all tensors of block `index`."""
        prefixes = tuple(f"{prefix}." for prefix in self._prefixes(index))
        return [name for name in self.checkpoint.names() if name.startswith(prefixes)]

    def stored_outside(self) -> list[str]:
        """The checkpoint's names of all tensors that belong to no block."""
        in_blocks = {name for index in range(len(self)) for name in self.stored_block(index)}
        return [name for name in self.checkpoint.names() if name not in in_blocks]

    def weights(self, index: int, source: Checkpoint | Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The weights of the linears of block `index`, each (O, I) float32 on the device.

        `source`: another checkpoint of the same model, or its tensors by the checkpoint's names.
        """
        stored = {linear: self._stored_weight(index, linear) for linear in self.architecture.linears[index]}
        source = source if source is not None else self.checkpoint
        tensors = source.read(list(stored.values())) if isinstance(source, Checkpoint) else source
        return {
            linear: as_rows(self._linear(index, linear), tensors[name]).to(self.device, torch.float32)
            for linear, name in stored.items()
        }

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
        self._load(block, names)
        try:
            yield block
        finally:
            for name in names:
                set_module_tensor_to_device(block, name, "meta")

    def start(self, windows: Tensor, batch: int) -> Stream:
        """Embed `windows` (N, L) and stop before the first block."""
        return Stream(self, windows, batch)

    def _linear(self, index: int, linear: str) -> nn.Module:
        module: nn.Module = self._blocks[index].get_submodule(linear)
        return module

    def _prefixes(self, index: int) -> set[str]:
        name = self.architecture.blocks[index]
        return {name, name.removeprefix(f"{self.model.base_model_prefix}.")}

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
            return (hidden_states,) if self._returns_tuple else hidden_states

        try:
            with self._forwards([forward] * len(self)):
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
    """The hidden states of some windows on their way through a StreamedModel."""

    def __init__(self, model: StreamedModel, windows: Tensor, batch: int) -> None:
        self._model = model
        self._tokens = [part.to(model.device) for part in torch.split(windows, batch)]
        self._hidden: list[Tensor] = []
        self._calls: dict[int, list[_Call]] = {}  # they depend on the size of a batch only
        self._next = 0
        with torch.no_grad():
            for tokens in self._tokens:
                hidden, calls = model._record(tokens)
                self._hidden.append(hidden)
                self._calls.setdefault(len(tokens), calls)

    def advance(self, block: nn.Module) -> None:
        """Run every batch through `block`, the next one of the model."""
        with torch.no_grad():
            for number, hidden in enumerate(self._hidden):
                call = self._calls[len(hidden)][self._next]
                output = block(hidden, *call.args, **call.kwargs)
                self._hidden[number] = output[0] if isinstance(output, tuple) else output
        self._next += 1

    def logits(self) -> Iterator[tuple[Tensor, Tensor]]:
        """After the last block: (tokens (1, L), logits (1, L, V)), a window at a time, since V is large."""
        assert self._next == len(self._model)
        with torch.no_grad():
            for tokens, hidden in zip(self._tokens, self._hidden, strict=True):
                for row in range(len(tokens)):
                    window = tokens[row : row + 1]
                    yield window, self._model._logits(window, hidden[row : row + 1])
