"""Documents out of plain text and JSON lines, compressed or not.

Memory stays bounded whatever a file holds: a text and a line have a longest length, what expands like no text is
refused, and JSON may be nested as deep as it likes in fields that are not wanted.
"""

from __future__ import annotations

import codecs
import io
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from copal.domain_files import DomainFile
from copal.errors import DataError
from copal.rows import LONGEST, Document, Fields, document_of, not_utf8, unreadable

__all__ = ["read_lines", "read_text"]

_LONG_LINE = 1 << 20  # characters; of longer lines only the top is parsed
_MOST_EXPANDED = 100  # bytes out of one byte; text gives 3 to 10, and what repeats itself some 30
_EXPANDED_UNCHECKED = 4 << 20  # bytes that the smallest file may give


def read_text(file: DomainFile) -> Iterator[Document]:
    """The one document of a file; of more than 32 MB, only the first 32 MB.

    Raises:
        DataError: it is not UTF-8, or cannot be decompressed.
    """
    with _opened(file) as stream:
        raw = stream.read(LONGEST)
        whole = not stream.read(1)
    raw = raw.removeprefix(codecs.BOM_UTF8)
    if b"\r" in raw:
        raw = raw.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(raw, final=whole)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise not_utf8(f"{file.path}, line {line}", error) from error
    yield Document(identity=f"path:{file.name}", text=text)


def read_lines(file: DomainFile, fields: Fields, start: int = 0, stop: float = math.inf) -> Iterator[Document]:
    """The documents of the lines that begin at the bytes from `start` to `stop`.

    Raises:
        DataError: a line is no JSON object with a text, is longer than 32 MB or not UTF-8; or the file cannot be
            decompressed.
    """
    for number, place, line in _lines(file, start, stop):
        where, row = (f"the line at byte {place}", f"@{place}") if start else (f"line {number}", f"#{number}")
        found = _parsed(line, f"{file.path}, {where}", fields)
        if found is not None:
            yield document_of(found, f"{file.path}, {where}", file.name + row, fields)


def _lines(file: DomainFile, start: int, stop: float) -> Iterator[tuple[int, int, bytes]]:
    """(number, place of the first byte, line without its end), of the lines that begin at bytes from `start` to `stop`.

    A line ends with a line feed, a carriage return or both. Empty ones count, and are not given.
    """
    with _opened(file) as stream:
        number, place = 0, 0
        if start:  # a line that begins before belongs to the part before
            stream.seek(start - 1)
            place = start - 1 + len(stream.readline(LONGEST))
        while place < stop and (raw := stream.readline(LONGEST + 1)):
            following = place + len(raw)
            if raw == b"\n":  # there may be millions
                number, place = number + 1, following
                continue
            if place == 0:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            for line in raw.removesuffix(b"\n").removesuffix(b"\r").split(b"\r"):
                number += 1
                if line:
                    yield number, place, line
                place += len(line) + 1
            place = following


def _parsed(line: bytes, where: str, fields: Fields) -> dict[str, Any] | None:
    """The JSON object of a line; None of an empty one."""
    if len(line) > LONGEST:
        raise DataError(f"{where}: longer than {LONGEST >> 20} MB; split the document, or store it as a .txt file")
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise not_utf8(where, error) from error
    if not text or text.isspace():
        return None
    try:
        row = _parse(text)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}); each line must be a JSON object by itself") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: not a JSON object with a field {fields.text}")
    return row


def _parse(text: str) -> Any:
    """A JSON value; of a long or deep one, only what its fields hold outside of brackets."""
    if len(text) <= _LONG_LINE:
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            raise
        except (RecursionError, ValueError):  # too deep, or a number with too many digits: in another field, maybe
            pass
    try:
        return json.loads(_shallow(text), parse_int=lambda digits: int(digits) if len(digits) < 4000 else math.inf)
    except json.JSONDecodeError as error:
        raise ValueError(error.msg) from error  # its place is that in the shortened text


# A string, a bracket, or a quotation mark that begins no string.
_MARK = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|["\[\]{}]', re.DOTALL)


def _shallow(text: str) -> str:
    """A JSON object with an empty list in the place of each list and object that its fields hold."""
    kept, start, depth = [], 0, 0
    for mark in _MARK.finditer(text):
        first = text[mark.start()]
        if first == '"' and mark.end() == mark.start() + 1:
            raise ValueError("a string does not end")
        if first in "[{":
            depth += 1
            if depth == 2:
                kept.append(text[start : mark.start()] + "[]")
        elif first in "]}":
            if depth == 2:
                start = mark.end()
            depth -= 1
    if depth:
        raise ValueError("a bracket does not close")
    return "".join(kept) + text[start:]


@contextmanager
def _opened(file: DomainFile) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed where its name says that it is compressed."""
    codec = {".gz": "gzip", ".zst": "zstd"}.get(file.path.suffix.lower())
    try:
        with file.path.open("rb") as stored:
            yield io.BufferedReader(_Expanded(file, stored, codec), 1 << 16) if codec else stored
    except OSError as error:
        raise unreadable(file, error) from error


class _Expanded(io.RawIOBase):
    """What a compressed file holds; refused where it is far more than text would give."""

    def __init__(self, file: DomainFile, stored: BinaryIO, codec: str) -> None:
        import pyarrow

        self._file, self._stored = file, stored
        self._stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(stored, mode="r"), codec)
        self._size = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count: int = self._stream.readinto(buffer)
        self._size += count
        if self._size > _EXPANDED_UNCHECKED and self._size > _MOST_EXPANDED * self._stored.tell():
            raise DataError(
                f"{self._file.path} expands to more than {_MOST_EXPANDED} times its size, as no text does: "
                "store it without compression if it is right"
            )
        return count
