"""A dry load: whether a model folder can be used, found without its weights in memory.

Configuration, tokenizer, and names, shapes and dtypes of all tensors are held against one another, as `from_pretrained`
would load them; `check_finite` reads the values, piece by piece. Nothing in the folder is run, and no hub is asked.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from copal.architecture import find_blocks, load_shapes, names_in_model, tie
from copal.checkpoint import Checkpoint, Stored
from copal.embeddings import longest_window, token_rows
from copal.errors import ModelError
from copal.folder import CONFIG
from copal.foreign import leaves, plainly, read_object, refuse_keys, unheard
from copal.progress import Progress, silent
from copal.tokenizer import check_tokenizer, check_tokenizer_files, load_tokenizer

__all__ = ["Loaded", "check_finite", "dry_load"]

_FLOATS = ("F64", "F32", "F16", "BF16")
_FEW, _SMALL = 1024, 1 << 24  # layers, and other sizes, that a configuration may name however little is stored
_COUNT = re.compile(r"(layers?|labels?|blocks?)$")  # transformers makes lists of that length before it makes a module
_POSITIONS = re.compile(r"position|context|window|seq|len|theta|token|seed")  # nothing is made of that size
_ANY = 1 << 62  # what fits a tensor's size
_BUFFERS = 1 << 30  # bytes
_PIECE = 32 << 20  # bytes
# Tensors of old checkpoints that transformers drops for every model.
_IGNORED = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """What a dry load has found.

    Attributes:
        tensors: the checkpoint's names of those that the model has a place for.
        longest_window: see `copal.embeddings.longest_window`.
    """

    tensors: tuple[str, ...]
    longest_window: int | None


def dry_load(folder: Path) -> Loaded:
    """Check that `folder` holds a causal language model that transformers and copal can use, whole.

    Raises:
        ModelError: it does not; one line that says what is missing or unfit, and what to do.
    """
    config = _read_config(folder)
    _check_kind(folder, config)
    checkpoint = Checkpoint(folder)
    _check_sizes(folder, config, checkpoint.stored)
    model = load_shapes(folder, _FEW + 2 * len(checkpoint.stored))
    names = names_in_model(model, checkpoint.names())
    used = _check_tensors(folder, model, checkpoint.stored, names)
    _check_buffers(folder, model, checkpoint.stored)
    find_blocks(model)
    check_tokenizer_files(folder)
    with unheard():
        check_tokenizer(folder, load_tokenizer(folder), token_rows(model))
    generation = folder / "generation_config.json"
    if generation.is_file():
        read_object(generation)
        with plainly(f"{generation} cannot be loaded"):
            GenerationConfig.from_pretrained(folder, local_files_only=True)
    return Loaded(tensors=used, longest_window=longest_window(model))


def check_finite(folder: Path, names: Collection[str], progress: Progress = silent) -> None:
    """Read the tensors `names` of the checkpoint in `folder`, a few megabytes at a time.

    Raises:
        ModelError: one of them holds NaN or infinity; names it.
    """
    checkpoint = Checkpoint(folder)
    total, done = sum(math.prod(checkpoint.stored[name].shape) for name in names), 0
    for name in sorted(names, key=lambda name: (checkpoint.stored[name].file, name)):
        for piece in checkpoint.read_rows(name, _PIECE):
            progress("check", done, total)
            if piece.is_floating_point() and not _is_finite(piece):
                raise ModelError(
                    f"{folder / checkpoint.stored[name].file}: the tensor {name} holds NaN or infinity; "
                    "no figure of this model would be one: take weights that are whole"
                )
            done += piece.numel()
    progress("check", done, total)


def _read_config(folder: Path) -> dict[str, Any]:
    """The configuration in `folder`, which asks for no code and for nothing from elsewhere."""
    path = folder / CONFIG
    if not path.is_file():
        raise ModelError(f"{folder} is not a Hugging Face model folder: it has no {CONFIG}")
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder} holds an adapter (adapter_config.json), which is loaded on top of another model; "
            "merge it into that one's weights (merge_and_unload of peft), and save those"
        )
    config = read_object(path)
    refuse_keys(path, config)
    return config


def _check_kind(folder: Path, config: Mapping[str, Any]) -> None:
    if config.get("is_encoder_decoder"):
        raise ModelError(f"{folder} is an encoder-decoder model; copal prunes causal language models")
    kind, stated = config.get("model_type"), config.get("architectures") or []
    if not isinstance(kind, str) or not isinstance(stated, list) or not all(isinstance(name, str) for name in stated):
        raise ModelError(f"{folder / CONFIG}: model_type is no text, or architectures is no list of texts")
    classes = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    if classes is None:
        raise ModelError(f"{folder}: {kind!r} is no causal language model that the installed transformers knows")
    fitting = {classes} if isinstance(classes, str) else set(classes)
    if stated and not fitting.intersection(stated):
        raise ModelError(f"{folder} holds a {', '.join(map(repr, stated))}, not a causal language model")


def _check_sizes(folder: Path, config: Mapping[str, Any], stored: Mapping[str, Stored]) -> None:
    """Refuse a configuration that would have transformers fill the memory before a shape can be compared."""
    tensors = max(_FEW, len(stored))
    largest = max((math.prod(tensor.shape) for tensor in stored.values()), default=0)
    values = max(_SMALL, largest)
    parts = [config]
    while parts:
        part = parts.pop()
        parts += [inner for inner in part.values() if isinstance(inner, dict)]
        for key, value in part.items():
            most = tensors if _COUNT.search(key) else _ANY if _POSITIONS.search(key) else values
            sizes = [] if isinstance(value, dict) else [leaf for leaf in leaves(value) if isinstance(leaf, int)]
            if max(sizes, default=0) > most:
                raise ModelError(
                    f"{folder / CONFIG}: {key!r} is more than {most}, which no model has whose weights are "
                    f"{len(stored)} tensors, the largest of {largest} values"
                )


def _check_tensors(
    folder: Path, model: PreTrainedModel, stored: Mapping[str, Stored], names: Mapping[str, str]
) -> tuple[str, ...]:
    """Hold the checkpoint's tensors against the model's; gives the names of those that it takes."""
    wanted: dict[str, Tensor] = model.state_dict()
    taken: dict[str, str] = {}
    surplus = []
    ignored = "|".join(f"({pattern})" for pattern in (*(model._keys_to_ignore_on_load_unexpected or ()), *_IGNORED))
    tables = {name for name, _ in model.named_buffers()}
    for name, place in names.items():
        if place in taken:
            raise ModelError(f"{folder} holds two tensors for one place in the model: {taken[place]} and {name}")
        if place not in wanted:
            # Masks and constants that older code stored: transformers makes them anew, or needs them no more.
            table = place in tables or stored[name].dtype not in _FLOATS or not stored[name].shape
            surplus += [] if table or re.search(ignored, place) else [name]
            continue
        taken[place] = name
        _check_tensor(folder, name, stored[name], wanted[place])
    optional = model._keys_to_ignore_on_load_missing or ()
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    missing = [
        name
        for name in tie(model, wanted.keys() - taken.keys())
        if name in parameters or not any(re.search(pattern, name) for pattern in optional)
    ]
    remedy = "take the config.json that belongs to these weights"
    if missing:
        raise ModelError(f"the weights in {folder} lack what its config.json asks for: {_some(missing)}; {remedy}")
    if surplus:
        raise ModelError(
            f"the weights in {folder} hold what its config.json has no place for: {_some(surplus)}; {remedy}, or "
            "load and save the model with transformers, which leaves out what it has no use for"
        )
    return tuple(taken.values())


def _some(names: list[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check_tensor(folder: Path, name: str, found: Stored, wanted: Tensor) -> None:
    if found.shape != tuple(wanted.shape):
        raise ModelError(f"{folder}: {name} has shape {found.shape}, config.json wants {tuple(wanted.shape)}")
    if wanted.is_floating_point() and found.dtype not in _FLOATS:
        raise ModelError(
            f"{folder}: {name} is stored as {found.dtype}, and copal prunes weights in 16 or 32 bits; "
            "dequantise them with the library that wrote them, and save them in bfloat16"
        )


def _check_buffers(folder: Path, model: PreTrainedModel, stored: Mapping[str, Stored]) -> None:
    """Buffers that no checkpoint holds, such as masks, are of the sizes that the configuration names."""
    wanted = sum(buffer.nbytes for buffer in model.buffers())
    if wanted > max(_BUFFERS, 4 * sum(math.prod(tensor.shape) for tensor in stored.values())):
        raise ModelError(
            f"{folder / CONFIG} asks for {wanted / 1e9:.0f} GB of tables beside the weights, far more than those "
            "take: its number of positions cannot be right"
        )


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.numel():
        return True
    low, high = tensor.aminmax()  # NaN wins both; ten times faster than isfinite
    return bool(low.isfinite() and high.isfinite())
