"""The dense base model: the Hugging Face folder that every version of a lineage is pruned from.

Its fingerprint covers what decides tokens and activations: `config.json`, the tokenizer's files and the safetensors
weights that transformers would load. `generation_config.json`, chat templates in files of their own, READMEs and
weights in other formats do not count.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from copal.config import fingerprint
from copal.files import sha256_file
from copal.folder import base_files
from copal.progress import Progress, silent
from copal.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Base", "base_fingerprint", "open_base"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Base:
    """The dense model: a Hugging Face folder with safetensors weights, and its `base_fingerprint`."""

    folder: Path
    fingerprint: str

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own tokenizer."""
        return load_tokenizer(self.folder)


def open_base(folder: Path, progress: Progress = silent) -> Base:
    """Check the model in `folder` (`copal.dry_load`) and take its fingerprint; either reads all of its weights.

    Raises:
        ModelError: the folder does not hold a dense causal language model that can be pruned.
    """
    from copal.dry_load import check_finite, dry_load

    check_finite(folder, dry_load(folder).tensors, progress)
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
