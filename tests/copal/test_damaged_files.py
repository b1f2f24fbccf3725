"""Damaged files of every kind: documents, or one line fit for a terminal; within a second, and no process ends."""

from __future__ import annotations

import gzip
import json
import random
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from copal.documents import read_documents, split_documents
from copal.errors import DataError
from support.damage import FEW_AND_MANY, damaged


def whole_files(folder: Path) -> list[tuple[str, bytes]]:
    """(ending, content) of good files."""
    table = pa.table(
        {
            "text": [f"text {number} " * 5 for number in range(10)],
            "id": [str(number) for number in range(10)],
            "more": pa.array([[("k", 1)]] * 10, pa.map_(pa.string(), pa.int64())),
        }
    )
    found = []
    for options in (
        {},
        {"compression": "zstd"},
        {"compression": "none", "use_dictionary": False},
        {"compression": "gzip", "data_page_version": "2.0"},
        {"row_group_size": 3},
    ):
        pq.write_table(table, folder / "whole", **options)
        found.append((".parquet", (folder / "whole").read_bytes()))
    rows = [{"text": f"t{number} é", "id": number, "more": {"a": [1, {"b": '"]}'}]}} for number in range(6)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    for ending in (".jsonl", ".txt"):
        found += [(ending, lines), (f"{ending}.gz", gzip.compress(lines))]
        found.append((f"{ending}.zst", pa.Codec("zstd").compress(lines, asbytes=True)))
    return found


def refusal(folder: Path) -> str:
    try:
        split_documents(read_documents(folder), 0.2)
    except DataError as error:
        return str(error)
    return ""


@FEW_AND_MANY
def test_a_damaged_file_is_read_or_refused_in_one_line(tmp_path: Path, count: int) -> None:
    drawn = random.Random(13)
    files = whole_files(tmp_path)
    folder = tmp_path / "domain"
    folder.mkdir()
    before = sorted(tmp_path.rglob("*"))
    read = 0
    for _ in range(count):
        ending, content = drawn.choice(files)
        path = folder / f"a{ending}"
        path.write_bytes(damaged(content, drawn))
        began = time.process_time()
        line = refusal(folder)
        assert time.process_time() - began < 1
        assert line.isprintable()
        assert line == "" or str(folder) in line
        read += not line
        path.unlink()
    assert sorted(tmp_path.rglob("*")) == before
    assert 0 < read < count


def test_a_damaged_footer_of_parquet_ends_no_process(tmp_path: Path) -> None:
    """pyarrow 25 does end it where it is asked for a column whose histograms have other lengths than they should."""
    files = [content for ending, content in whole_files(tmp_path) if ending == ".parquet"]
    (tmp_path / "whole").unlink()
    content = files[2]
    for place in range(len(content) - int.from_bytes(content[-8:-4], "little") - 8, len(content)):
        changed = bytearray(content)
        changed[place] ^= 4
        (tmp_path / "a.parquet").write_bytes(changed)
        assert refusal(tmp_path).isprintable()
