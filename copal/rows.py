"""What a row of a file must be to give a document, and the words of the errors where it is not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from copal.domain_files import DomainFile
from copal.errors import DataError
from copal.printable import printable

__all__ = ["LONGEST", "PART", "Document", "Fields", "document_of", "listed", "not_utf8", "unreadable"]

LONGEST = 32 << 20  # bytes of a document or a line
PART = 16 << 20  # bytes of a part of a large file
_SHOWN, _SHOWN_LETTERS = 20, 40  # fields that an error names, and how much of each


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One document of a domain.

    Attributes:
        identity: `id:` and the row's id, else `path:` and the file's place in the domain's folder, with `#` and the
            row's number (from 1) where a file holds many, or with `@` and the place of its first byte where the lines
            before it were not read. Decides the document's side and its place in line.
        text: never empty.
    """

    identity: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Fields:
    """The names of the two fields that are read."""

    text: str
    identity: str


def document_of(row: Mapping[str, Any], where: str, place: str, fields: Fields) -> Document:
    """The document of a row; `place` is its identity where it has no id."""
    if fields.text not in row:
        raise DataError(
            f"{where}: no field {fields.text} (its fields: {listed(row)}); "
            "name the field with the text in calibration.text_field"
        )
    text, given = (_as_text(row.get(name), where) for name in (fields.text, fields.identity))
    if not isinstance(text, str):
        raise DataError(f"{where}: the field {fields.text} is not text but {type(text).__name__}; mend or drop the row")
    if given is not None and (isinstance(given, bool) or not isinstance(given, (str, int))):
        raise DataError(
            f"{where}: the field {fields.identity} is neither text nor a whole number but {type(given).__name__}; "
            "name another field in calibration.id_field, or one that is not there"
        )
    identity = f"path:{place}" if given in (None, "") else f"id:{given}"
    try:
        (identity + text).encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        raise DataError(f"{where}: not Unicode text ({error.reason}); mend or drop the row") from error
    return Document(identity=identity, text=text)


def _as_text(value: Any, where: str) -> Any:
    """Text that Parquet stores as bytes, and UUIDs, as text; other values as they are."""
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise not_utf8(where, error) from error
    return value


def listed(names: Iterable[str]) -> str:
    """Names of fields, which may be anything, for a message."""
    found = list(names)
    shown = [printable(name[:_SHOWN_LETTERS]) for name in found[:_SHOWN]]
    return ", ".join(shown + [f"and {len(found) - _SHOWN} more"] * (len(found) > _SHOWN)) or "none"


def not_utf8(where: str, error: UnicodeDecodeError) -> DataError:
    return DataError(f"{where}: not UTF-8 text ({error.reason}); convert the file first")


def unreadable(file: DomainFile, error: Exception, kind: str = "") -> DataError:
    reason = printable(" ".join((getattr(error, "strerror", None) or str(error)).split()))
    what = f"is not {kind}, or cannot be read" if kind else "cannot be read"
    return DataError(f"{file.path} {what}: {reason}; bring back a copy, or remove it")
