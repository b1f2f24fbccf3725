"""safetensors files as bytes: which tensor lies where in them, whatever wrote them. No tensor is loaded.

A file is the length of its header (8 bytes, little-endian), the header (JSON: dtype, shape and place of each tensor),
and the bytes of the tensors, one after another without gaps: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from copal.bounded import parse_json
from copal.errors import ModelError

__all__ = ["Tensor", "TensorFile", "beginning", "header_of", "pieces", "read_tensor_file", "tensors_of"]

_LENGTH = 8  # bytes in which a file tells how long its header is
_LONGEST = 32 << 20  # bytes of a header: 200,000 tensors
_MOST_DIMENSIONS, _MOST_BYTES = 64, 1 << 62
_METADATA = "__metadata__"
_PIECE = 16 << 20


@dataclass(frozen=True, slots=True)
class Tensor:
    """What a header says of a tensor: its dtype as safetensors spells it, its shape, and its bytes."""

    dtype: str
    shape: tuple[int, ...]
    size: int


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A safetensors file: its header as it stands there, and its tensors in the order in which they lie."""

    path: Path
    header: bytes
    tensors: Mapping[str, Tensor]

    def offsets(self) -> Iterator[tuple[str, int]]:
        """Of each tensor, where in the file it begins."""
        offset = _LENGTH + len(self.header)
        for name, tensor in self.tensors.items():
            yield name, offset
            offset += tensor.size


def read_tensor_file(path: Path) -> TensorFile:
    """What is in a safetensors file, from its header.

    Raises:
        ModelError: it is none, or is cut short.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH), "little")
        if length > min(size, _LONGEST):
            raise ModelError(f"{path} is damaged: it has no header of a safetensors file")
        header = file.read(length)
    tensors = tensors_of(header, f"{path} is damaged: its header")
    if _LENGTH + length + sum(tensor.size for tensor in tensors.values()) != size:
        raise ModelError(f"{path} is damaged: it is not as long as its header says")
    return TensorFile(path, header, tensors)


def tensors_of(header: bytes, where: object) -> dict[str, Tensor]:
    """The tensors that a header names, in the order in which they lie.

    Raises:
        ModelError: it is no header of a safetensors file; begins with `where`.
    """
    value = parse_json(header, where, ModelError)
    if not isinstance(value, dict):
        raise ModelError(f"{where} is not a JSON object")
    found: list[tuple[int, int, str, str, tuple[int, ...]]] = []
    for name, entry in value.items():
        match entry:
            case _ if name == _METADATA:
                continue
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end]} if len(
                shape
            ) <= _MOST_DIMENSIONS and all(
                type(number) is int and 0 <= number <= _MOST_BYTES for number in (*shape, begin, end)
            ):
                found.append((begin, end, name, dtype, tuple(shape)))
            case _:
                raise ModelError(f"{where} does not say where the tensor {name!r} lies")
    tensors: dict[str, Tensor] = {}
    place = 0
    for begin, end, name, dtype, sizes in sorted(found):
        if begin != place or end < begin:
            raise ModelError(f"{where} has a gap before the tensor {name!r}, or an overlap")
        tensors[name] = Tensor(dtype, sizes, end - begin)
        place = end
    return tensors


def header_of(tensors: Mapping[str, Tensor]) -> tuple[bytes, dict[str, Tensor]]:
    """(header, `tensors` in the order in which they are to lie) of a file that transformers loads.

    The order is that of safetensors' own writer: the widest numbers first, so that all are aligned, then by name. An
    export of another day is known by it: see `flows.models.shards`.
    """
    ordered = dict(sorted(tensors.items(), key=lambda item: (-_width(item[1]), item[0])))
    entries: dict[str, object] = {_METADATA: {"format": "pt"}}
    place = 0
    for name, tensor in ordered.items():
        entries[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (place, place + tensor.size)}
        place += tensor.size
    text = json.dumps(entries, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % _LENGTH), ordered


def beginning(header: bytes) -> bytes:
    """What a file begins with: the length of its header, and the header."""
    return len(header).to_bytes(_LENGTH, "little") + header


def pieces(file: BinaryIO, size: int) -> Iterator[bytes]:
    """The next `size` bytes of a file, or as many as there are, a few MB at a time."""
    while size > 0 and (data := file.read(min(size, _PIECE))):
        yield data
        size -= len(data)


def _width(tensor: Tensor) -> float:
    """Bytes of a number."""
    return tensor.size / max(1, math.prod(tensor.shape))
