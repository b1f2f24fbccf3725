"""The published JSON Schemas of records and log entries (`flows/schemas/`), and one clear line on what breaks one.

In those files every `description` completes the words "must be": error messages are made of it.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable
from datetime import datetime, timedelta
from importlib.resources import files
from typing import Any

__all__ = ["problem_with", "schema_of", "shown"]


def schema_of(name: str) -> dict[str, Any]:
    """The JSON Schema called `name`, as "copal.lineage/2"."""
    text = (files("flows.lineage") / "schemas" / f"{name.replace('/', '.')}.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def problem_with(value: object, name: str) -> str | None:
    """The first thing in `value` that breaks the schema `name`, as "field must be ..., not ..."; None where none does.

    A number must be finite, which JSON itself sees to, and 1.0 is no integer: both have digests of their own.
    """
    error = next(_validator(name).iter_errors(value), None)
    if error is None:
        return None
    if error.validator == "required":
        missing = next(field for field in error.validator_value if field not in error.instance)
        return f"{_path([*error.absolute_path, missing])} is missing"
    if error.validator == "additionalProperties":
        unknown = min(set(error.instance) - set(error.schema["properties"]))
        return f"{_path([*error.absolute_path, unknown])} is not a field of {name}"
    must_be = f"must be {error.schema['description']}, not {shown(error.instance)}"
    return f"{_path(error.absolute_path)} {must_be}".lstrip()


def shown(value: object) -> str:
    """`repr`, cut to a length that a message can bear."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@functools.cache
def _validator(name: str) -> Any:
    from jsonschema import Draft202012Validator, FormatChecker
    from jsonschema.validators import extend

    types = Draft202012Validator.TYPE_CHECKER.redefine_many(
        {"integer": lambda _, value: _is_whole(value), "number": lambda _, value: _is_finite(value)}
    )
    formats = FormatChecker(formats=())
    formats.checks("date-time", raises=ValueError)(_is_utc)
    return extend(Draft202012Validator, type_checker=types)(schema_of(name), format_checker=formats)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def _is_utc(value: object) -> bool:
    return not isinstance(value, str) or datetime.fromisoformat(value).utcoffset() == timedelta(0)


def _path(parts: Iterable[str | int]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")
