"""Whether a folder holds a causal language model that copal can prune, and the fingerprint of one.

What counts in the fingerprint is what decides tokens and activations: `config.json`, the tokenizer's files and the
safetensors weights that transformers would load. `generation_config.json`, chat templates in files of their own,
READMEs and weights in other formats do not count.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from copal.config import fingerprint
from copal.errors import ModelError
from copal.files import sha256_file
from copal.progress import Progress, silent

__all__ = [
    "CONFIG",
    "TOKENIZER",
    "WEIGHTS_INDEX",
    "base_fingerprint",
    "check_causal_lm",
    "read_json_object",
    "weight_files",
]


CONFIG = "config.json"


WEIGHTS = "model.safetensors"


WEIGHTS_INDEX = "model.safetensors.index.json"


_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)


TOKENIZER = (*_VOCABULARIES, "added_tokens.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json")


def base_fingerprint(folder: Path, progress: Progress = silent) -> str:
    """SHA-256 (hexadecimal) of what decides tokens and activations: see the head of this module.

    It is taken over the canonical JSON of {file name: SHA-256 of its bytes}.

    Raises:
        ModelError: the folder has no configuration or no safetensors weights.
    """
    read_config(folder)
    names = [CONFIG, *(name for name in TOKENIZER if (folder / name).is_file()), *weight_files(folder)]
    total = sum((folder / name).stat().st_size for name in names)
    digests: dict[str, str] = {}
    done = 0
    for name in names:
        progress("fingerprint", done, total)
        digests[name] = sha256_file(folder / name)
        done += (folder / name).stat().st_size
    progress("fingerprint", done, total)
    return fingerprint(digests)


def check_causal_lm(folder: Path) -> None:
    """Check that `folder` holds a causal language model that transformers knows, its tokenizer and whole weights.

    Raises:
        ModelError: it does not; one line that says what is missing or unfit.
    """
    from safetensors import SafetensorError, safe_open
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = read_config(folder)
    if config.get("auto_map"):
        raise ModelError(
            f"{folder / CONFIG} asks for code that comes with the model (auto_map), which copal never runs; "
            "where transformers knows the architecture itself, delete that key"
        )
    if config.get("is_encoder_decoder"):
        raise ModelError(f"{folder} is an encoder-decoder model; copal prunes causal language models")
    if config.get("quantization_config"):
        raise ModelError(f"{folder} holds quantised weights; dequantise them first (a base is dense)")
    kind = config.get("model_type")
    classes = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    if classes is None:
        raise ModelError(f"{folder}: {kind!r} is no causal language model that the installed transformers knows")
    fitting = {classes} if isinstance(classes, str) else set(classes)
    stated = config.get("architectures") or sorted(fitting)
    if not fitting.intersection(stated):
        raise ModelError(f"{folder} holds a {', '.join(map(str, stated))}, not a causal language model")
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        raise ModelError(f"{folder} has no tokenizer (tokenizer.json, tokenizer.model, vocab.json or vocab.txt)")
    for name in weight_files(folder):
        if name == WEIGHTS_INDEX:
            continue
        try:
            with safe_open(folder / name, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{folder / name} is damaged or not downloaded in full: {error}") from error


def read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise ModelError(f"{folder} is not a Hugging Face model folder: it has no {CONFIG}")
    return read_json_object(path)


def read_json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:  # broken JSON, or not UTF-8
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object")
    return value


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files that transformers loads from `folder`, the index of shards among them."""
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    index = folder / WEIGHTS_INDEX
    if not index.is_file():
        if any(folder.glob("*.bin")):
            raise ModelError(
                f"{folder} has pickled weights only (*.bin), which can run code when they are loaded; "
                "convert them to safetensors with save_pretrained first"
            )
        raise ModelError(f"{folder} has no safetensors weights ({WEIGHTS}, or shards with their index)")
    placed = read_json_object(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise ModelError(f"{index} has no weight_map")
    shards = sorted({str(name) for name in placed.values()})
    for name in shards:
        if Path(name).name != name or not (folder / name).is_file():
            raise ModelError(f"{index} names the shard {name}, which is not in the folder")
    return [WEIGHTS_INDEX, *shards]
