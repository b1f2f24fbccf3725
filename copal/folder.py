"""The files of a Hugging Face model folder that transformers loads: configuration, tokenizer, safetensors weights."""

from __future__ import annotations

from pathlib import Path

from copal.errors import ModelError
from copal.foreign import read_object

__all__ = [
    "CONFIG",
    "PATTERNS",
    "TOKENIZER",
    "VOCABULARIES",
    "WEIGHTS",
    "WEIGHTS_INDEX",
    "base_files",
    "weight_files",
    "weight_map",
]

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)
TOKENIZER = (*VOCABULARIES, "added_tokens.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json")

PATTERNS = (CONFIG, *TOKENIZER, "*.safetensors", WEIGHTS_INDEX)
"""Names, some with wildcards, of the files of which `base_files` tells those that a folder has."""


def base_files(folder: Path) -> list[str]:
    """Names of the files in `folder` that the fingerprint of a base covers.

    Raises:
        ModelError: the folder has no configuration or no safetensors weights.
    """
    if not (folder / CONFIG).is_file():
        raise ModelError(f"{folder} is not a Hugging Face model folder: it has no {CONFIG}")
    return [CONFIG, *(name for name in TOKENIZER if (folder / name).is_file()), *weight_files(folder)]


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files that transformers loads from `folder`, the index of shards among them.

    Raises:
        ModelError: there are none, or the index names files that are not in the folder.
    """
    if (folder / WEIGHTS).is_file():  # where an index is there as well, transformers loads this one
        return [WEIGHTS]
    index = folder / WEIGHTS_INDEX
    if not index.is_file():
        if any(folder.glob("*.bin")):
            raise ModelError(
                f"{folder} has pickled weights only (*.bin), which can run code when they are loaded; "
                "convert them to safetensors with save_pretrained first"
            )
        raise ModelError(f"{folder} has no safetensors weights ({WEIGHTS}, or shards with their index)")
    shards = sorted(set(weight_map(index).values()))
    for name in shards:
        if Path(name).name != name or not (folder / name).is_file():
            raise ModelError(f"{index} names the shard {name!r}, which is not in the folder")
    return [WEIGHTS_INDEX, *shards]


def weight_map(index: Path) -> dict[str, str]:
    """Name of each tensor -> name of its shard, as an index says.

    Raises:
        ModelError: it says nothing of the kind.
    """
    placed = read_object(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise ModelError(f"{index} has no weight_map")
    return {name: str(file) for name, file in placed.items()}
