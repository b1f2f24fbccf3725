"""Hugging Face folders with safetensors weights, read and written a few tensors at a time."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from copal.errors import ModelError
from copal.files import write_json

__all__ = ["Checkpoint", "CheckpointWriter", "save_shard"]

_INDEX = "model.safetensors.index.json"


class Checkpoint:
    """Reads single tensors of a safetensors folder (one file, or shards with an index).

    Raises:
        ModelError: a weights file is missing or damaged, or (on reading) a tensor is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of: dict[str, str]
        index = folder / _INDEX
        single = folder / "model.safetensors"
        if single.is_file():  # where both are there, transformers loads this one
            self._file_of = dict.fromkeys(self._names_in(single), single.name)
        elif index.is_file():
            self._file_of = json.loads(index.read_text())["weight_map"]
        else:
            raise ModelError(f"{folder} has no safetensors weights (model.safetensors, or shards with their index)")

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._file_of)

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """The named tensors, in the dtype in which they are stored, on the CPU."""
        tensors: dict[str, Tensor] = {}
        for file in sorted({self._locate(name) for name in names}):
            try:
                with safe_open(self.folder / file, framework="pt") as shard:
                    for name in names:
                        if self._file_of[name] == file:
                            tensors[name] = shard.get_tensor(name)
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{self.folder / file} cannot be read: {error}") from error
        return tensors

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which tensor `name` is stored."""
        with safe_open(self.folder / self._locate(name), framework="pt") as shard:
            return shard.get_slice(name)[:0].dtype  # type: ignore[no-any-return]

    def _locate(self, name: str) -> str:
        if name not in self._file_of:
            raise ModelError(f"{self.folder} has no tensor {name}")
        return self._file_of[name]

    def _names_in(self, file: Path) -> list[str]:
        try:
            with safe_open(file, framework="pt") as shard:
                return list(shard.keys())
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file} cannot be read: {error}") from error


class CheckpointWriter:
    """Writes a copy of a checkpoint shard by shard, with some tensors replaced; loads with `from_pretrained`."""

    def __init__(self, source: Checkpoint, folder: Path, shards: int, *, writes: bool = True) -> None:
        """`shards`: how many times `write` will be called. `writes`: False does nothing (see `copal.processes`)."""
        self._source, self._folder, self._shards = source, folder, shards
        self._weight_map: dict[str, str] = {}
        self._bytes = 0
        self._written = 0
        self._writes = writes
        if writes:
            folder.mkdir(parents=True)

    def write(self, names: list[str], replaced: Mapping[str, Tensor]) -> None:
        """Write the tensors `names` of the source, those in `replaced` from there, as one shard."""
        if not self._writes:
            return
        self._written += 1
        file = f"model-{self._written:05d}-of-{self._shards:05d}.safetensors"
        tensors = {**self._source.read([name for name in names if name not in replaced]), **replaced}
        save_shard(self._folder / file, tensors, {"format": "pt"})
        self._weight_map |= dict.fromkeys(tensors, file)
        self._bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def finish(self) -> None:
        """Copy what is not weights (configuration, tokenizer) and write the index."""
        if not self._writes:
            return
        assert self._written == self._shards
        assert self._weight_map.keys() == set(self._source.names())
        for path in sorted(self._source.folder.iterdir()):
            if path.is_file() and path.suffix != ".safetensors" and path.name != _INDEX:
                shutil.copyfile(path, self._folder / path.name)
        index = {"metadata": {"total_size": self._bytes}, "weight_map": self._weight_map}
        write_json(self._folder / _INDEX, index)


def save_shard(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as a safetensors file.

    Raises:
        OSError: the file cannot be written, for instance because the disk is full.
    """
    try:
        save_file(dict(tensors), path, metadata=dict(metadata) if metadata else None)
    except SafetensorError as error:
        system = re.search(r"os error (\d+)", str(error))  # safetensors wraps what the system said
        if system is None:
            raise
        number = int(system.group(1))
        raise OSError(number, os.strerror(number), str(path)) from error
