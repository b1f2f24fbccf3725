"""The fields of records and log entries: what each must hold, and one clear line on what breaks one.

A `Must` says of a field what it must be. Error messages and the published JSON Schemas are made of it.

Types are strict, for a digest follows the spelling of a value: 1, 1.0 and true are three values, and each stays as it
was written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated, Any, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    GetPydanticSchema,
    ModelWrapValidatorHandler,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from copal.config import canonical_json
from copal.errors import CopalError

__all__ = [
    "Frozen",
    "Hash64",
    "JsonObject",
    "LineageError",
    "Must",
    "Number",
    "NumberOrNull",
    "Perplexities",
    "Sha256",
    "Sha256OrNull",
    "Text",
    "TextOrNull",
    "UtcTime",
    "Whole",
    "WholeOrNull",
    "must_be",
    "parse",
    "shown",
]


class LineageError(CopalError):
    """A record or a log entry is damaged, altered, of another schema, or was made of unusable values."""


@dataclass(frozen=True, slots=True)
class Must:
    """Says what a field must be: `what` completes these words in error messages, and is its `description`."""

    what: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_wrap_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {**handler(schema), "description": self.what}

    def _check(self, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError as error:
            if error.errors(include_url=False)[0]["loc"]:  # it is a part of the value: that says more
                raise
            raise must_be(self.what) from error


def must_be(what: str) -> PydanticCustomError:
    """The error of a value that is not `what`."""
    return PydanticCustomError("must_be", what)


class Frozen(BaseModel):
    """A value that is checked when it is made and never changed.

    Raises:
        LineageError: in one line, what a field must be.
    """

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, json_schema_serialization_defaults_required=True
    )

    def as_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return self.model_dump(mode="json", by_alias=True)

    def _problem(self) -> str | None:
        """What is wrong with the fields together, as a whole sentence."""
        return None

    @model_validator(mode="wrap")
    @classmethod
    def _in_one_line(cls, value: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        try:
            made = handler(value)
            problem = made._problem()
        except ValidationError as error:
            if info.context is not None:  # a part of what `parse` reads, which knows where it stands
                raise
            raise LineageError(f"{cls._name()}: {_line(error)}") from error
        if problem is None:
            return made
        if info.context is not None:
            raise PydanticCustomError("together", problem)
        raise LineageError(f"{cls._name()}: {problem}")

    @classmethod
    def _name(cls) -> str:
        return cls.model_config.get("title") or cls.__name__.lower()


_Model = TypeVar("_Model", bound=Frozen)


def parse(kind: type[_Model], value: object, where: str) -> _Model:
    """The value of a model that was read as plain JSON.

    Raises:
        LineageError: names `where` and the field, and says what the field must be.
    """
    try:
        return kind.model_validate(value, context={"where": where})
    except ValidationError as error:
        raise LineageError(f"{where}: {_line(error)}") from error


def _line(error: ValidationError) -> str:
    """The first thing in a value that is wrong, as "field must be ..., not ..."."""
    first = error.errors(include_url=False)[0]
    path, kind = _path(first["loc"]), first["type"]
    if kind == "together":
        return f"{path} {first['msg']}".lstrip()
    if kind == "missing":
        return f"{path} is missing"
    if kind == "extra_forbidden":
        return f"{path} is not a field of it"
    what = first["msg"] if kind == "must_be" else "a JSON object" if kind == "model_type" else f"other: {first['msg']}"
    return f"{path} must be {what}, not {shown(first['input'])}".lstrip()


def _path(parts: Iterable[str | int]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in map(_short, parts)).removeprefix(
        "."
    )


def _short(part: str | int) -> str | int:
    """A key may be any text."""
    return part[:_LONGEST_KEY] if isinstance(part, str) else part


def shown(value: object) -> str:
    """`repr`, cut to a length that a message can bear."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _finite(value: object) -> float:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise ValueError


def _plain_object(value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError
    try:
        return dict(json.loads(canonical_json(dict(value))))  # shares nothing with the caller
    except TypeError as error:
        raise ValueError from error


def _utc(value: str) -> str:
    if not value.endswith(("Z", "+00:00", "-00:00")) or datetime.fromisoformat(value).utcoffset() != timedelta(0):
        raise ValueError
    return value


def _kept(check: Callable[[object], object], schema: JsonSchemaValue) -> GetPydanticSchema:
    """The type of a value that `check` gives and that is written as it is: pydantic would write 1 as 1.0."""
    return GetPydanticSchema(
        get_pydantic_core_schema=lambda _source, _handler: core_schema.no_info_plain_validator_function(check),
        get_pydantic_json_schema=lambda _schema, _handler: schema,
    )


_LONGEST_KEY = 60  # characters of a key that a message shows
_TIME = {"type": "string", "format": "date-time", "pattern": "(Z|[+-]00:00)$"}
_SHA256 = StringConstraints(pattern="^[0-9a-f]{64}$")

Text = Annotated[str, Field(min_length=1), Must("text")]
TextOrNull = Annotated[Text | None, Must("text or null")]
Whole = Annotated[int, Field(ge=0), Must("a whole number of at least 0")]
WholeOrNull = Annotated[Whole | None, Must("a whole number of at least 0 or null")]
Number = Annotated[float, _kept(_finite, {"type": "number"}), Must("a finite number")]
NumberOrNull = Annotated[Number | None, Must("a finite number or null")]
Hash64 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{16}$"), Must("16 hexadecimal digits")]
Sha256 = Annotated[str, _SHA256, Must("a SHA-256 in hexadecimal")]
Sha256OrNull = Annotated[Sha256 | None, Must("a SHA-256 in hexadecimal or null")]
UtcTime = Annotated[str, AfterValidator(_utc), WithJsonSchema(_TIME), Must("a UTC time in ISO 8601")]
JsonObject = Annotated[
    Mapping[str, Any],
    _kept(_plain_object, {"type": "object"}),
    Must("a JSON object of plain values, without NaN and infinity"),
]
Perplexities = Annotated[Mapping[str, Number], Must("a JSON object of finite numbers by domain")]
