"""JSON that others wrote or may have altered: within bounds, so that none takes long or ends in a traceback."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from copal.errors import CopalError, one_line

__all__ = ["check_bounds", "parse_json", "read_json", "read_typed"]

_T = TypeVar("_T")

_LARGEST = 32 << 20  # bytes; the largest configuration on the hub has 10 MB, and a record of 50 domains half of one
_DEEPEST = 64  # objects and lists within one another; what is read here has five or six
_MOST = 1_000_000  # values; a record of 10,000 linears has 100,000


def read_json(path: Path, error: type[CopalError]) -> Any:
    """The JSON value in a file of at most 32 MB.

    Args:
        error: the type of what is raised, in one line that names the file.

    Raises:
        error: the file cannot be read, is too large, or as `parse_json`.
    """
    return parse_json(_read(path, error), path, error)


def read_typed(kind: type[_T], path: Path, error: type[CopalError]) -> _T:
    """The dataclass `kind` out of a file that holds it as a JSON object; other keys are passed over.

    Raises:
        error: as `read_json`; or a field is missing or of another type: it is named.
    """
    value = read_json(path, error)
    try:
        made: _T = _as(kind, value, "it")
    except TypeError as found:
        raise error(f"{path} is damaged: {found}") from found
    return made


def parse_json(data: bytes | str, where: object, error: type[CopalError]) -> Any:
    """The JSON value that `data` spells.

    Raises:
        error: it is none, holds NaN or numbers of thousands of digits, or is nested too deep.
    """
    try:
        value = json.loads(data, parse_constant=_constant)
    except RecursionError as found:
        raise error(f"{where} is nested too deep") from found
    except ValueError as found:  # also what is not UTF-8
        raise error(f"{where} is not JSON: {one_line(found)[:300]}") from found
    check_bounds(value, where, error)
    return value


def check_bounds(value: Any, where: object, error: type[CopalError]) -> None:
    """Check that a value of lists and mappings is not too deep or too large to be looked through.

    Each part counts as often as it is reached: YAML can name one part many times, and those parts one another.

    Raises:
        error: it is.
    """
    level, count = [value], 0
    for _ in range(_DEEPEST):
        level = list(itertools.islice((inner for part in level for inner in _parts(part)), _MOST + 1))
        count += len(level)
        if count > _MOST:
            raise error(f"{where} holds more than {_MOST:,} values, which no such file does")
        if not level:
            return
    raise error(f"{where} is nested too deep")


def _as(kind: Any, value: Any, name: str) -> Any:
    """`value` as what the annotation `kind` says: a dataclass, a tuple or mapping of values, text, a number or None."""
    inner = get_args(kind)
    if isinstance(kind, type) and is_dataclass(kind) and isinstance(value, dict):
        hints = get_type_hints(kind)
        missing = [field.name for field in fields(kind) if field.name not in value]
        if missing:
            raise TypeError(f"{name} has no {missing[0]}")
        return kind(**{field.name: _as(hints[field.name], value[field.name], field.name) for field in fields(kind)})
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_as(inner[0], part, f"a part of {name}") for part in value)
    if get_origin(kind) is Mapping and isinstance(value, dict):
        return {key: _as(inner[1], part, f"{key[:40]!a} of {name}") for key, part in value.items()}
    if NoneType in inner:
        return None if value is None else _as(inner[0], value, name)
    if kind is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:
        return float(value)
    if kind in (int, str) and type(value) is kind:
        return value
    raise TypeError(f"{name} is {type(value).__name__}, or no such number, and not {getattr(kind, '__name__', kind)}")


def _read(path: Path, error: type[CopalError]) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
    except OSError as found:
        raise error(f"{path} cannot be read: {found.strerror}") from found
    if len(data) > _LARGEST:
        raise error(f"{path} is larger than {_LARGEST >> 20} MB, which no such file is")
    return data


def _parts(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _constant(name: str) -> float:
    if name == "NaN":
        raise ValueError("NaN is no number")
    return float(name)
