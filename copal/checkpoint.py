"""Hugging Face folders with safetensors weights, read and written a few tensors at a time."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from copal.errors import ModelError
from copal.files import write_json
from copal.folder import WEIGHTS, WEIGHTS_INDEX, weight_files, weight_map
from copal.foreign import one_line, refuse_pointer

__all__ = ["Checkpoint", "CheckpointWriter", "Shard", "Stored", "save_shard"]

_LONGEST_NAME = 300  # characters


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor lies in a checkpoint, and what it is there.

    Attributes:
        file: name of the safetensors file.
        dtype: as safetensors spells it: `F32`, `BF16`, `F8_E4M3`, ...
        shape: of the tensor.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Shard:
    """A file that a `CheckpointWriter` has written: its name, the tensors in it, and the bytes of those."""

    file: str
    names: tuple[str, ...]
    size: int


class Checkpoint:
    """Reads single tensors of a safetensors folder (one file, or shards with an index).

    What is there is read from the files themselves, as transformers does; an index that says otherwise is refused.

    Raises:
        ModelError: a weights file is missing or damaged, or (on reading) a tensor is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stored: dict[str, Stored] = {}
        files = [name for name in weight_files(folder) if name != WEIGHTS_INDEX]
        for file in files:
            for name, stored in _header(folder / file).items():
                if name in self.stored:
                    raise ModelError(f"{folder} holds {name} twice: in {self.stored[name].file} and in {file}")
                self.stored[name] = stored
        if files != [WEIGHTS]:
            self._check_index(weight_map(folder / WEIGHTS_INDEX))

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self.stored)

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """The named tensors, in the dtype in which they are stored, on the CPU."""
        tensors: dict[str, Tensor] = {}
        for file in sorted({self._locate(name) for name in names}):
            with _opened(self.folder / file) as shard:
                for name in names:
                    if self.stored[name].file == file:
                        tensors[name] = shard.get_tensor(name)
        return tensors

    def read_rows(self, name: str, most: int) -> Iterator[Tensor]:
        """Tensor `name` piece by piece: rows (its first dimension) that follow one another, of about `most` bytes."""
        file, shape = self._locate(name), self.stored[name].shape
        rows = max(1, most // max(1, 8 * math.prod(shape[1:])))
        for start in range(0, shape[0] if shape else 1, rows):
            with _opened(self.folder / file) as shard:  # anew, so that what was read does not stay mapped
                yield shard.get_slice(name)[start : start + rows] if shape else shard.get_tensor(name)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which tensor `name` is stored."""
        with _opened(self.folder / self._locate(name)) as shard:
            return shard.get_slice(name)[:0].dtype  # type: ignore[no-any-return]

    def _locate(self, name: str) -> str:
        if name not in self.stored:
            raise ModelError(f"{self.folder} has no tensor {name}")
        return self.stored[name].file

    def _check_index(self, placed: Mapping[str, str]) -> None:
        index = self.folder / WEIGHTS_INDEX
        for name, file in placed.items():
            if name not in self.stored or self.stored[name].file != file:
                raise ModelError(f"{index} names the tensor {name!r}, which is not in {file!r}")
        for name, stored in self.stored.items():
            if name not in placed:
                raise ModelError(f"{index} does not name the tensor {name}, which is in {stored.file}")


class CheckpointWriter:
    """Writes a copy of a checkpoint shard by shard, with some tensors replaced; loads with `from_pretrained`."""

    def __init__(self, source: Checkpoint, folder: Path, shards: int, *, writes: bool = True) -> None:
        """`shards`: how many times `write` will be called. `writes`: False does nothing (see `copal.processes`)."""
        self._source, self._folder, self._shards = source, folder, shards
        self._written: list[Shard] = []
        self._writes = writes
        if writes:
            folder.mkdir(parents=True, exist_ok=True)

    def write(self, names: list[str], replaced: Mapping[str, Tensor]) -> Shard | None:
        """Write the tensors `names` of the source, those in `replaced` from there, as one shard; None: nothing."""
        if not self._writes:
            return None
        file = f"model-{len(self._written) + 1:05d}-of-{self._shards:05d}.safetensors"
        tensors = {**self._source.read([name for name in names if name not in replaced]), **replaced}
        save_shard(self._folder / file, tensors, {"format": "pt"})
        shard = Shard(file, tuple(tensors), sum(tensor.nbytes for tensor in tensors.values()))
        self._written.append(shard)
        return shard

    def adopt(self, shard: Shard) -> None:
        """Take a shard that is there, written in the same order for the same step, for one that `write` wrote."""
        self._written.append(shard)

    def finish(self) -> None:
        """Copy what is not weights (configuration, tokenizer) and write the index."""
        if not self._writes:
            return
        placed = {name: shard.file for shard in self._written for name in shard.names}
        assert len(self._written) == self._shards
        assert placed.keys() == set(self._source.names())
        for path in sorted(self._source.folder.iterdir()):
            if path.is_file() and path.suffix != ".safetensors" and path.name != WEIGHTS_INDEX:
                shutil.copyfile(path, self._folder / path.name)
        size = sum(shard.size for shard in self._written)
        index = {"metadata": {"total_size": size}, "weight_map": placed}
        write_json(self._folder / WEIGHTS_INDEX, index)


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


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as shard:
            yield shard
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} is damaged or not downloaded in full: {one_line(error)}") from error


def _header(path: Path) -> dict[str, Stored]:
    refuse_pointer(path)
    with _opened(path) as shard:
        slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118 - it is no mapping
        for name in slices:
            if not name.isprintable() or len(name) > _LONGEST_NAME:
                raise ModelError(f"{path} holds a tensor whose name no model has: {name[:_LONGEST_NAME]!r}")
        return {name: Stored(path.name, part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
