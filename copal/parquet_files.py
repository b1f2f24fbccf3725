"""Documents out of Parquet: of the rows a few at a time, of the columns those that are wanted.

Nothing that other columns hold, and none of the descriptions that writers add, can refuse a file.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from copal.domain_files import DomainFile
from copal.errors import DataError
from copal.rows import PART, Document, Fields, document_of, listed, unreadable

__all__ = ["read_parquet", "row_groups"]

_BATCH = 8 << 20  # bytes that are decoded at a time, about
_BATCH_ROWS = 512
_LARGEST_ROW = 128 << 20  # bytes of all its columns, on average in a row group


def read_parquet(file: DomainFile, fields: Fields, only: int | None = None) -> Iterator[Document]:
    """The documents of all row groups, or of the first 16 MB of one.

    Raises:
        DataError: it is not Parquet, has no column with text or a row without, or rows of more than 128 MB.
    """
    with _parquet_errors(file), file.path.open("rb") as stored:
        footer = _footer(stored)
        if footer.num_rows == 0:  # an empty part may have no columns at all
            return
        names = footer.schema.to_arrow_schema().names
        if names.count(fields.text) != 1:
            many = "more than one" if fields.text in names else "no"
            raise DataError(
                f"{file.path} has {many} column {fields.text} (its columns: {listed(names)}); "
                "name the column with the text in calibration.text_field"
            )
        wanted = [name for name in (fields.text, fields.identity) if name in names]
        number, size = 1, 0
        for group in range(footer.num_row_groups):
            rows = footer.row_group(group).num_rows
            if not rows or only not in (None, group):
                number += rows
                continue
            for row in _rows(file, stored, footer, group, wanted):
                document = document_of(row, f"{file.path}, row {number}", f"{file.name}#{number}", fields)
                yield document
                number += 1
                size += len(document.text)
                if only is not None and size > PART:
                    return


def row_groups(file: DomainFile) -> int:
    """How many row groups a file has.

    Raises:
        DataError: it is not Parquet.
    """
    with _parquet_errors(file), file.path.open("rb") as stored:
        return int(_footer(stored).num_row_groups)


def _footer(stored: BinaryIO) -> Any:
    """What the end of a Parquet file says of it, without Arrow's own schema: Parquet's suffices, and is not damaged."""
    from pyarrow import parquet

    size = stored.seek(0, io.SEEK_END)
    stored.seek(max(0, size - 8))
    tail = stored.read()
    stored.seek(max(0, size - 8 - int.from_bytes(tail[:4], "little")))
    footer = stored.read().removesuffix(tail).replace(b"ARROW:schema", b"arrow-schema")
    return parquet.read_metadata(io.BytesIO(b"PAR1" + footer + tail))


def _rows(file: DomainFile, stored: BinaryIO, footer: Any, group: int, wanted: list[str]) -> Iterator[dict[str, Any]]:
    """The wanted columns of the rows of a row group, few at a time."""
    from pyarrow import parquet

    at_a_time = _rows_at_a_time(file, stored, footer, group, wanted)
    reader = parquet.ParquetFile(stored, metadata=footer, pre_buffer=False, buffer_size=1 << 20)
    options = {"batch_size": at_a_time, "row_groups": [group], "columns": wanted, "use_threads": False}
    for batch in reader.iter_batches(**options):
        columns = [_values(batch.column(name)) for name in wanted]
        for values in zip(*columns, strict=True):
            yield dict(zip(wanted, values, strict=True))


def _rows_at_a_time(file: DomainFile, stored: BinaryIO, footer: Any, group: int, wanted: list[str]) -> int:
    """How many rows may be decoded at once. A small file may name one long value of a dictionary many times.

    Of the sizes that the footer tells, only those of row groups are asked for: pyarrow ends the process where what a
    column says of itself is damaged, unless it is Arrow's own reader that comes upon it.
    """
    import pyarrow
    from pyarrow import compute, parquet

    rows = footer.row_group(group)
    longest = rows.total_byte_size / rows.num_rows
    if longest > _LARGEST_ROW:
        raise DataError(f"{file.path}, row group {group}: rows of more than {_LARGEST_ROW >> 20} MB; split them")
    reader = parquet.ParquetFile(stored, metadata=footer, pre_buffer=False, buffer_size=1 << 20, read_dictionary=wanted)
    options = {"batch_size": 1, "row_groups": [group], "columns": wanted, "use_threads": False}
    for batch in itertools.islice(reader.iter_batches(**options), 1):
        for column in batch.columns:
            if isinstance(column, pyarrow.DictionaryArray):
                longest = max(longest, compute.max(compute.binary_length(column.dictionary)).as_py() or 0)
    return max(1, min(_BATCH_ROWS, int(_BATCH / max(longest, 1))))


def _values(column: Any) -> list[Any]:
    import pyarrow

    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:  # whoever looks at the bytes names the row
        values = column.cast(pyarrow.large_binary()).to_pylist()
    return values


@contextmanager
def _parquet_errors(file: DomainFile) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:  # the last of names of columns
        raise unreadable(file, error, "a Parquet file") from error
