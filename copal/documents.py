"""The documents of a domain (of a large one, a sample that fits into memory), and which side each is on."""

from __future__ import annotations

import hashlib
import itertools
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from copal.domain_files import ENDINGS, DomainFile, domain_files
from copal.errors import DataError
from copal.parquet_files import read_parquet, row_groups
from copal.rows import PART, Document, Fields
from copal.text_files import read_lines, read_text

__all__ = ["Document", "hash64", "normalised", "read_documents", "split_documents"]

_MOST = 256 << 20  # bytes of memory that the documents of a domain may take
_EACH = 512  # of these, what one takes beside its text and identity, here and where sides are shared out
_NORMALISED_AT_ONCE = 1 << 20  # characters
_SPACE = re.compile(r"[ \n]")


def read_documents(folder: Path, *, text_field: str = "text", id_field: str = "id") -> list[Document]:
    """The documents under `folder`: files in the order of their names, rows as they come.

    A `.txt` file is one document; each line of a `.jsonl` file and each row of a `.parquet` file is one, with its text
    in the field `text_field` and, if it likes, a text or whole number in the field `id_field`. What its other fields
    hold does not matter. `.txt` and `.jsonl` files may be compressed (`.gz`, `.zst`). Other files, hidden files and
    documents of nothing but white space are passed over.

    Documents that take more than 256 MB of memory are not all read: then parts of the files (`_parts`) are,
    in the order of the hashes of their names, until that much is read. So memory and time are bounded, and the same
    folder gives the same documents.

    Raises:
        DataError: the folder is missing, holds no document, or something that is no file (`domain_files`); a file is
            not UTF-8, JSON lines or Parquet, or has a row without text; or all documents have one id. The error names
            the file, the row and what to do.
    """
    fields = Fields(text=text_field, identity=id_field)
    files = domain_files(folder)
    documents, complete = _taken(itertools.chain.from_iterable(_read(file, fields) for file in files))
    if not complete:
        documents.clear()
        parts = [part for file in files for part in _parts(file, fields)]
        parts.sort(key=lambda part: hash64(part.name))
        documents, _ = _taken(itertools.chain.from_iterable(part.read() for part in parts))
    if not documents:
        raise DataError(f"domain folder {folder} holds no document ({', '.join(ENDINGS)} files with text in them)")
    first = documents[0].identity
    if len(documents) > 1 and all(document.identity == first for document in documents):
        raise DataError(
            f"all {len(documents)} documents of {folder} have one id ({first.removeprefix('id:')[:40]!a}), and what "
            "has one id is not shared out to calibration and evaluation: give each an id of its own, or name another "
            "field in calibration.id_field"
        )
    return documents


def split_documents(documents: Iterable[Document], evaluation_share: float) -> tuple[list[Document], list[Document]]:
    """Share documents out to (calibration, evaluation), each side in the order of the hash of the identity.

    The first 8 bytes of SHA-256(identity), as a fraction of 2^64, are below `evaluation_share` for evaluation. So a
    document's side depends on nothing but its identity, and an edited or added document makes no other one change
    sides. Texts that are the same after NFKC, case folding and collapsing of white space count once, under the identity
    with the smallest hash: if any of them is evaluation text, the text is kept from calibration.
    """
    kept: dict[bytes, tuple[int, str, Document]] = {}
    for document in documents:
        key = _normalised_digest(document.text)
        entry = (hash64(document.identity), document.text, document)
        if key not in kept or entry[:2] < kept[key][:2]:
            kept[key] = entry
    ordered = sorted(kept.values(), key=lambda entry: entry[:2])
    limit = evaluation_share * 2**64
    return (
        [document for hashed, _, document in ordered if hashed >= limit],
        [document for hashed, _, document in ordered if hashed < limit],
    )


def hash64(text: str) -> int:
    """The first 8 bytes of SHA-256 of a text as a whole number: for what looks drawn and is the same everywhere."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def normalised(text: str) -> Iterator[str]:
    """A text after NFKC, case folding and collapsing of white space, without its ends; of a long one piece by piece.

    Pieces begin with a space or a line break, which are left out: neither NFKC nor a word goes across one.
    """
    start = 0
    while start < len(text):
        found = _SPACE.search(text, start + _NORMALISED_AT_ONCE)
        end = found.start() if found else len(text)
        words = unicodedata.normalize("NFKC", text[start:end]).casefold().split()
        if words:
            yield " ".join(words)
        start = end


def _normalised_digest(text: str) -> bytes:
    """SHA-256 of a normalised text."""
    digest = hashlib.sha256()
    for number, piece in enumerate(normalised(text)):
        digest.update(f"{' ' if number else ''}{piece}".encode())
    return digest.digest()


def _taken(documents: Iterable[Document]) -> tuple[list[Document], bool]:
    """The documents with text in them, as many as memory may hold; and whether that is all of them."""
    kept: list[Document] = []
    size = 0
    for document in documents:
        size += sys.getsizeof(document.text) + sys.getsizeof(document.identity) + _EACH
        if size > _MOST:
            return kept, False
        if document.text and not document.text.isspace():
            kept.append(document)
    return kept, True


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """A part of a file that can be read without the others: some 16 MB of it at most, or one document.

    Attributes:
        name: its own, and the same whatever the file's other parts hold.
        read: its documents.
    """

    name: str
    read: Callable[[], Iterator[Document]]


def _read(file: DomainFile, fields: Fields) -> Iterator[Document]:
    """All documents of a file."""
    kind = file.ending.split(".")[1]
    if kind == "txt":
        return read_text(file)
    return read_lines(file, fields) if kind == "jsonl" else read_parquet(file, fields)


def _parts(file: DomainFile, fields: Fields) -> Iterator[_Part]:
    """The parts of a file.

    Lines that are compressed are one part, the first 16 MB of them: there is no way to the rest but through it. A row
    group of a Parquet file is a part, or its first 16 MB.
    """
    if file.ending in (".jsonl.gz", ".jsonl.zst"):
        yield _Part(name=file.name, read=partial(read_lines, file, fields, 0, PART))
    elif file.size <= PART or file.ending.startswith(".txt"):
        yield _Part(name=file.name, read=partial(_read, file, fields))
    elif file.ending == ".jsonl":
        for start in range(0, file.size, PART):
            yield _Part(name=f"{file.name}@{start}", read=partial(read_lines, file, fields, start, start + PART))
    else:
        for group in range(row_groups(file)):
            yield _Part(name=f"{file.name}@{group}", read=partial(read_parquet, file, fields, group))
