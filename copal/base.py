"""The dense base model: the Hugging Face folder that every version of a lineage is pruned from.

Its fingerprint covers what decides tokens and activations: `config.json`, the tokenizer's files and the safetensors
weights that transformers would load. `generation_config.json`, chat templates in files of their own, READMEs and
weights in other formats do not count.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from copal.config import fingerprint
from copal.errors import ModelError
from copal.files import sha256_file
from copal.progress import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PATTERNS", "Base", "base_files", "base_fingerprint", "check_causal_lm", "open_base"]

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_WEIGHTS_INDEX = "model.safetensors.index.json"
_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)
_TOKENIZER = (*_VOCABULARIES, "added_tokens.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json")

PATTERNS = (_CONFIG, *_TOKENIZER, "*.safetensors", _WEIGHTS_INDEX)
"""Names, some with wildcards, of the files of which `base_files` tells those that a folder has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Base:
    """The dense model: a Hugging Face folder with safetensors weights, and its `base_fingerprint`."""

    folder: Path
    fingerprint: str

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own tokenizer."""
        from transformers import AutoTokenizer

        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            self.folder, local_files_only=True, trust_remote_code=False
        )
        return tokenizer


def open_base(folder: Path, progress: Progress = silent) -> Base:
    """Check the model in `folder` (`check_causal_lm`) and take its fingerprint, which reads all of its files.

    Raises:
        ModelError: the folder does not hold a dense causal language model that can be pruned.
    """
    check_causal_lm(folder)
    return Base(folder=folder, fingerprint=base_fingerprint(folder, progress))


def base_fingerprint(folder: Path, progress: Progress = silent) -> str:
    """SHA-256 (hexadecimal) of what decides tokens and activations: see the head of this module.

    It is taken over the canonical JSON of {file name: SHA-256 of its bytes}.

    Raises:
        ModelError: the folder has no configuration or no safetensors weights.
    """
    names = base_files(folder)
    total = sum((folder / name).stat().st_size for name in names)
    digests: dict[str, str] = {}
    done = 0
    for name in names:
        progress("fingerprint", done, total)
        digests[name] = sha256_file(folder / name)
        done += (folder / name).stat().st_size
    progress("fingerprint", done, total)
    return fingerprint(digests)


def base_files(folder: Path) -> list[str]:
    """Names of the files in `folder` that the fingerprint covers.

    Raises:
        ModelError: the folder has no configuration or no safetensors weights.
    """
    _read_config(folder)
    return [_CONFIG, *(name for name in _TOKENIZER if (folder / name).is_file()), *_weight_files(folder)]


def check_causal_lm(folder: Path) -> None:
    """Check that `folder` holds a causal language model that transformers knows, its tokenizer and whole weights.

    Raises:
        ModelError: it does not; one line that says what is missing or unfit.
    """
    from safetensors import SafetensorError, safe_open
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = _read_config(folder)
    if config.get("auto_map"):
        raise ModelError(
            f"{folder / _CONFIG} asks for code that comes with the model (auto_map), which copal never runs; "
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
    for name in _weight_files(folder):
        if name == _WEIGHTS_INDEX:
            continue
        try:
            with safe_open(folder / name, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{folder / name} is damaged or not downloaded in full: {error}") from error


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / _CONFIG
    if not path.is_file():
        raise ModelError(f"{folder} is not a Hugging Face model folder: it has no {_CONFIG}")
    return _read_json_object(path)


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:  # broken JSON, or not UTF-8
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object")
    return value


def _weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files that transformers loads from `folder`, the index of shards among them."""
    if (folder / _WEIGHTS).is_file():
        return [_WEIGHTS]
    index = folder / _WEIGHTS_INDEX
    if not index.is_file():
        if any(folder.glob("*.bin")):
            raise ModelError(
                f"{folder} has pickled weights only (*.bin), which can run code when they are loaded; "
                "convert them to safetensors with save_pretrained first"
            )
        raise ModelError(f"{folder} has no safetensors weights ({_WEIGHTS}, or shards with their index)")
    placed = _read_json_object(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise ModelError(f"{index} has no weight_map")
    shards = sorted({str(name) for name in placed.values()})
    for name in shards:
        if Path(name).name != name or not (folder / name).is_file():
            raise ModelError(f"{index} names the shard {name}, which is not in the folder")
    return [_WEIGHTS_INDEX, *shards]
