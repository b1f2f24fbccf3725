"""Which blocks and linears a model has: found by looking at its module tree, never by a list of names.

A decoder block is an element of the outermost `nn.ModuleList` whose elements are all of one kind and hold linears; what
lies outside (embeddings, last norm, head) is never pruned. Linears that read the same input (query/key/value, gate/up)
are found while the block runs: see `copal.recorder.MomentRecorder`.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from copal.errors import ModelError
from copal.experts import find_routers, split_experts
from copal.foreign import PLAIN_ATTENTION, PLAIN_EXPERTS, plainly, quiet

__all__ = [
    "Architecture",
    "as_rows",
    "find_blocks",
    "find_linears",
    "hidden_states",
    "load_config",
    "load_shapes",
    "load_skeleton",
    "names_in_model",
    "shape_of",
    "tie",
]

_EXPERT_NAMES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}  # Mixtral's checkpoints -> copal.experts


@dataclass(frozen=True, slots=True)
class Architecture:
    """The names that a walk over a checkpoint needs.

    Attributes:
        blocks: dotted module names of the decoder blocks, in the order in which they run.
        linears: for each block, the names (within the block) of the linears that are pruned, in module order.
    """

    blocks: tuple[str, ...]
    linears: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, model: nn.Module) -> Architecture:
        """Look at `model` (its weights may be on the meta device).

        Raises:
            ModelError: no stack of decoder blocks is there.
        """
        blocks = find_blocks(model)
        return cls(tuple(blocks), tuple(tuple(find_linears(model.get_submodule(name))) for name in blocks))


def load_config(folder: Path) -> PreTrainedConfig:
    """The configuration in `folder`, whose attention and experts are computed by transformers' own code.

    Other implementations are fetched, or need a library of their own; they differ by rounding.
    """
    config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    attention, experts = config._attn_implementation, config._experts_implementation
    config._attn_implementation = attention if attention in PLAIN_ATTENTION else None  # of all its parts
    config._experts_implementation = experts if experts in PLAIN_EXPERTS else None
    return config


def load_skeleton(folder: Path) -> PreTrainedModel:
    """Build the causal language model that `folder`/config.json names, its parameters on the meta device.

    No code of the checkpoint is run, and no weight is read. Experts are taken apart (`copal.experts`). Head and
    embeddings are tied where config.json says so; whether they stay so depends on what is stored (`tie`).

    Raises:
        ModelError: `folder` holds no configuration of a causal language model that transformers knows, or its experts
            cannot be taken apart.
    """
    return _build(folder, init_empty_weights(include_buffers=False))


def load_shapes(folder: Path, most: int) -> PreTrainedModel:
    """`load_skeleton`, of a folder that may ask for anything: buffers are on the meta device too, nothing is allocated.

    Raises:
        ModelError: as `load_skeleton`, or the model would have more than `most` parameter tensors.
    """

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal most
        most -= 1
        if most < 0:
            raise ModelError(f"{folder / 'config.json'} asks for far more layers or experts than the weights hold")

    hook = register_module_parameter_registration_hook(count)
    try:
        return _build(folder, torch.device("meta"))
    finally:
        hook.remove()


def tie(model: PreTrainedModel, missing: set[str]) -> set[str]:
    """Tie parameters of `model`, loaded but for those named in `missing`, as `from_pretrained` does.

    Of a pair that config.json ties, a checkpoint may hold one tensor, either of the two; or both, and then they are
    tied only if they are equal. Gives those of `missing` that have got no values.
    """
    missing = set(missing)
    with quiet():
        model.tie_weights(missing_keys=missing, recompute_mapping=False)
    return missing


def names_in_model(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """A checkpoint's name of each tensor -> its name in `model`, in the order of `stored`.

    They differ where a checkpoint leaves the base model's prefix out, or where transformers renames on loading; a name
    that the model does not have stays as it is.
    """
    conversions = [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]
    conversions += [WeightRenaming(rf"\.{old}\.weight$", f".{new}.weight") for old, new in _EXPERT_NAMES.items()]
    known = model.state_dict()
    names = {}
    for name in stored:
        renamed, plain = (
            rename_source_key(name, renamings, [], model.base_model_prefix, known)[0] for renamings in (conversions, [])
        )
        names[name] = renamed if renamed in known else plain
    return names


def find_blocks(model: nn.Module) -> list[str]:
    """Names of the decoder blocks: the elements of the outermost list of like modules that holds most parameters.

    Raises:
        ModelError: there is no such list.
    """
    candidates: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside_another = any(name.startswith(f"{outer}.") for outer in candidates)
        if isinstance(module, nn.ModuleList) and not inside_another and _is_stack(module):
            candidates[name] = module
    if not candidates:
        raise ModelError(
            f"{type(model).__name__} has no decoder blocks that copal recognises: "
            "looked for a ModuleList whose elements are all of one class and each hold a Linear or Conv1D"
        )
    stack = max(candidates, key=lambda name: sum(p.numel() for p in candidates[name].parameters()))
    return [f"{stack}.{index}" for index in range(len(candidates[stack]))]


def find_linears(block: nn.Module) -> dict[str, nn.Module]:
    """The linears of a block by their name within it, routers of experts left out."""
    routers = find_routers(block)
    return {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module not in routers
    }


def as_rows(linear: nn.Module, weight: Tensor) -> Tensor:
    """A view of `weight` as (out features, in features): Conv1D keeps its transpose. Its own inverse."""
    return weight.T if isinstance(linear, Conv1D) else weight


def hidden_states(output: Any) -> Any:
    """The hidden states in what a block returned: of some models that is a tuple, and they are its first element."""
    return output[0] if isinstance(output, tuple) else output


def shape_of(linear: nn.Module) -> tuple[int, int]:
    """(O, I): out and in features of a linear."""
    rows, columns = as_rows(linear, linear.get_parameter("weight")).shape
    return rows, columns


def _build(folder: Path, without_memory: AbstractContextManager[Any]) -> PreTrainedModel:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is not a Hugging Face model folder: it has no config.json")
    with plainly(f"{folder} is not a causal language model that transformers knows"):
        config = load_config(folder)
        with without_memory:
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False).eval()
        model.tie_weights()
    split_experts(model)
    return model


def _is_stack(modules: nn.ModuleList) -> bool:
    one_class = len({type(module) for module in modules}) == 1
    return one_class and all(find_linears(module) for module in modules)
