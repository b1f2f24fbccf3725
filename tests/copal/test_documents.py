"""What is read of a domain's folder (issue 13, points 5 to 7): valid data, or one line with file, row and remedy."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import socket
import unicodedata
import uuid
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from copal import documents, parquet_files, rows, text_files
from copal.documents import read_documents
from copal.errors import DataError
from support import reading
from support.memory import measured


def write_jsonl(path: Path, lines: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def zstd(content: bytes) -> bytes:
    return pa.Codec("zstd").compress(content, asbytes=True)


def texts(folder: Path, **fields: str) -> list[str]:
    return [document.text for document in read_documents(folder, **fields)]


def refusal(folder: Path, **fields: str) -> str:
    """The one line that refuses the folder; it is fit for a terminal."""
    with pytest.raises(DataError) as caught:
        read_documents(folder, **fields)
    line = str(caught.value)
    assert line.isprintable()
    return line


# --- what is valid is read


def test_reads_every_format_in_path_order(tmp_path: Path) -> None:
    folder = tmp_path / "a [1]* dömain?"
    write_jsonl(folder / "b.jsonl", [{"text": "2020-01-01", "id": 7}, {"text": "two"}, {"text": " \n"}])
    (folder / "b.jsonl").open("a").write('\n{"text": "line\\u2028end", "id": "x", "more": [1]}\n')
    (folder / "sub").mkdir()
    (folder / "sub" / "c.TXT").write_bytes("\ufeffgrüße\r\nall".encode())
    (folder / "a.txt").write_text("first")
    pq.write_table(pa.table({"other": [1, 2], "text": ["p", "q"], "id": ["r", None]}), folder / "z.parquet")
    (folder / "README.md").write_text("not a document")
    (folder / ".gitignore").write_text("/x")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "d.txt").write_text("not a document")

    read = [(document.identity, document.text) for document in read_documents(folder)]

    assert read == [
        ("path:a.txt", "first"),
        ("id:7", "2020-01-01"),
        ("path:b.jsonl#2", "two"),
        ("id:x", "line\u2028end"),
        ("path:sub/c.TXT", "grüße\nall"),
        ("id:r", "p"),
        ("path:z.parquet#2", "q"),
    ]


def test_reading_needs_no_network_and_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    pq.write_table(pa.table({"text": ["p"]}), tmp_path / "z.parquet")
    (tmp_path / "a.txt").write_text("text")
    assert len(read_documents(tmp_path)) == 2
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["std::vector", "100%", "%41", "a#b", "a?b", "*", "[1]", "~", "$HOME", "a b", "ü"])
def test_letters_in_names_are_letters(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (folder / f"{name}.txt").write_text("t")
    write_jsonl(folder / f"{name}.jsonl", [{"text": "j"}])
    pq.write_table(pa.table({"text": ["p"]}), folder / f"{name}.parquet")
    assert sorted(texts(folder)) == ["j", "p", "t"]


def test_lines_end_as_python_says_and_empty_ones_count(tmp_path: Path) -> None:
    lines = b'{"text": "1"}\r{"text": "2"}\r\n\r\r\n{"text": "3"}\n\n{"text": "4"}\r'
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines)
    read = [document.identity for document in read_documents(tmp_path)]
    assert read == ["path:a.jsonl#1", "path:a.jsonl#2", "path:a.jsonl#5", "path:a.jsonl#7"]
    with (tmp_path / "a.jsonl").open(encoding="utf-8-sig") as file:  # with universal ends of lines
        numbers = [number for number, line in enumerate(file, start=1) if line.strip()]
    assert numbers == [1, 2, 5, 7]


@pytest.mark.parametrize(
    "field",
    [
        '"meta": ' + "[" * 100_000 + "]" * 100_000,
        '"meta": ' + '{"a":' * 100_000 + "1" + "}" * 100_000,
        '"meta": ' + "9" * 10_000,
        '"meta": ' + "[" * 5000 + '"]}\\"{"' + "]" * 5000,
        '"meta": [' + "[]," * 400_000 + "0]",
    ],
    ids=["lists", "objects", "digits", "brackets in strings", "a long line"],
)
def test_json_of_any_depth_and_length_may_stand_in_other_fields(tmp_path: Path, field: str) -> None:
    lines = f'{{"id": 5, {field}, "text": "a"}}\n{{"text": "b"}}\n'
    (tmp_path / "a.jsonl").write_text(lines)
    assert [(document.identity, document.text) for document in read_documents(tmp_path)] == [
        ("id:5", "a"),
        ("path:a.jsonl#2", "b"),
    ]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=4), json_values, max_size=5))
def test_what_is_left_of_deep_json_are_the_plain_fields(row: dict[str, object]) -> None:
    shortened = json.loads(text_files._shallow(json.dumps(row)))
    assert shortened == {name: [] if isinstance(value, (list, dict)) else value for name, value in row.items()}


def parquet(folder: Path, name: str = "a", schema: pa.Schema | None = None, **columns: object) -> Path:
    path = folder / f"{name}.parquet"
    pq.write_table(pa.table(columns, schema=schema), path)
    return path


def test_parquet_with_columns_that_nobody_knows_is_read(tmp_path: Path) -> None:
    strange = {
        "map": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
        "half": pa.array([[1.0]], pa.list_(pa.float16(), 1)),
        "span": pa.array([1], pa.duration("ns")),
        "many": pa.array([{"a": [{"b": 1}]}]),
        "raw": pa.array([b"\xff"]),
        "text.en": pa.array([b"\xff"]),
    }
    parquet(tmp_path, text=["one"], **strange)
    assert texts(tmp_path) == ["one"]


@pytest.mark.parametrize("note", [b"huggingface", b"pandas", b"ARROW:schema"])
def test_broken_descriptions_of_parquet_do_not_count(tmp_path: Path, note: bytes) -> None:
    table = pa.table({"text": ["one"], "days": pa.array([1], pa.duration("s"))})
    path = tmp_path / "a.parquet"
    if note == b"ARROW:schema":
        pq.write_table(table, path)
        (written,) = re.findall(rb"/////[\w+/]+=*", path.read_bytes())
        path.write_bytes(path.read_bytes().replace(written, b"!" * len(written)))
        with pytest.raises(ValueError):  # else this test shows nothing
            pq.ParquetFile(path)
    else:
        features = b'{"info": {"features": {"text": {"_type": "NoSuchType"}}}}'
        for content in (features, b"{" * 100_000):
            pq.write_table(table.replace_schema_metadata({note: content}), path)
            assert texts(tmp_path) == ["one"]
    assert texts(tmp_path) == ["one"]


def test_empty_row_groups_and_parts_pass(tmp_path: Path) -> None:
    schema = pa.schema({"text": pa.string(), "id": pa.int64()})
    empty, one = schema.empty_table(), pa.table({"text": ["one", "two"], "id": [None, 2]}, schema=schema)
    with pq.ParquetWriter(tmp_path / "a.parquet", schema) as writer:
        for table in (empty, one, empty, one, empty):
            writer.write_table(table)
    pq.write_table(empty, tmp_path / "b.parquet")
    pq.write_table(pa.table({}), tmp_path / "c.parquet")
    for name in ("d.jsonl", "e.txt", "f.jsonl.gz"):
        (tmp_path / name).write_bytes(gzip.compress(b"") if name.endswith("gz") else b"")
    assert [document.identity for document in read_documents(tmp_path)] == [
        "path:a.parquet#1",
        "id:2",
        "path:a.parquet#3",
        "id:2",
    ]


def test_uuids_whole_numbers_and_text_in_every_encoding_of_parquet_are_ids_and_texts(tmp_path: Path) -> None:
    drawn = uuid.UUID(int=7)
    parquet(tmp_path, "a", text=["a"], id=pa.array([drawn.bytes], pa.uuid()))
    parquet(tmp_path, "b", text=pa.array([b"b"]), id=pa.array([b"bytes"]))
    parquet(tmp_path, "c", text=pa.array(["c"]).dictionary_encode(), id=pa.array([255], pa.uint8()))
    parquet(tmp_path, "d", text=pa.array(["d"], pa.large_string()), id=pa.array([None], pa.null()))
    parquet(tmp_path, "e", text=pa.array(["e"], pa.string_view()))
    assert [(document.identity, document.text) for document in read_documents(tmp_path)] == [
        (f"id:{drawn}", "a"),
        ("id:bytes", "b"),
        ("id:255", "c"),
        ("path:d.parquet#1", "d"),
        ("path:e.parquet#1", "e"),
    ]


def test_rows_of_parquet_are_numbered_through_row_groups(tmp_path: Path) -> None:
    count = 3 * parquet_files._BATCH_ROWS
    table = pa.table({"text": [str(number) for number in range(1, count + 1)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=700)
    for document in read_documents(tmp_path):
        assert document.identity == f"path:a.parquet#{document.text}"
    assert len(read_documents(tmp_path)) == count


@pytest.mark.parametrize("compress", [gzip.compress, zstd])
def test_compressed_files_give_what_is_in_them(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    ending = "gz" if compress is gzip.compress else "zst"
    one, two = b'\xef\xbb\xbf{"text": "one"}\r\n', '{"text": "zwei ü"}\n{"id": 3, "text": "three"}'.encode()
    (tmp_path / f"a.jsonl.{ending}").write_bytes(compress(one) + compress(two))  # two frames, as appending makes them
    (tmp_path / f"b.TXT.{ending.upper()}").write_bytes(compress("ünë\r\nfin".encode()))
    assert [(document.identity, document.text) for document in read_documents(tmp_path)] == [
        (f"path:a.jsonl.{ending}#1", "one"),
        (f"path:a.jsonl.{ending}#2", "zwei ü"),
        ("id:3", "three"),
        (f"path:b.TXT.{ending.upper()}", "ünë\nfin"),
    ]


def test_other_fields_may_hold_text_and_id(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"body": "a", "text": 5, "key": "k", "id": 1.5}])
    parquet(tmp_path, body=["b"], key=[2], text=[5])
    read = [(each.identity, each.text) for each in read_documents(tmp_path, text_field="body", id_field="key")]
    assert read == [("id:k", "a"), ("id:2", "b")]


# --- what is not names the file, the row and the remedy


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"caf\xe9", "line 1: not UTF-8"),
        ("a.txt", b"fine\r\nfine\ncaf\xe9", "line 3: not UTF-8"),
        ("a.txt", b"ends within a letter \xc3", "line 1: not UTF-8"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": "caf\xe9"}\n', "line 2: not UTF-8"),
        ("a.jsonl", b'{"text": "fine"}\n\n{"text": \n', "line 3: not JSON"),
        ("a.jsonl", b'{"text": "fine"}\n["text"]\n', "line 2: not a JSON object"),
        ("a.jsonl", b'{"body": "x", "more": 1}\n', "line 1: no field text (its fields: body, more); name the field"),
        ("a.jsonl", b"{}\n", "line 1: no field text (its fields: none)"),
        ("a.jsonl", b'{"\\u001b[2J": "x"}\n', "line 1: no field text (its fields: \\x1b[2J)"),
        ("a.jsonl", b'{"text": 5}\n', "line 1: the field text is not text but int"),
        ("a.jsonl", b'{"text": null}\n', "line 1: the field text is not text"),
        ("a.jsonl", b'{"text": ' + b"[" * 9000 + b"]" * 9000 + b"}\n", "line 1: the field text is not text but list"),
        ("a.jsonl", b'{"text": "x", "id": 1.5}\n', "line 1: the field id"),
        ("a.jsonl", b'{"text": "x", "id": ' + b"9" * 9999 + b"}\n", "line 1: the field id"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: not Unicode"),
        ("a.jsonl", b'{"text": "' + b'\\"' * 600_000, "line 1: not JSON"),
        ("a.jsonl", b'{"text": "x", "m": ' + b"[" * 9000 + b"}\n", "line 1: not JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "fine"}\n' * 9)[:-9], "cannot be read"),
        ("a.jsonl.zst", zstd(b'{"text": "fine"}\n' * 9)[:-9], "cannot be read"),
        ("a.txt.gz", b"no gzip", "cannot be read"),
        ("a.txt.gz", gzip.compress(b"one") + b"rubbish after it", "cannot be read"),
        ("a.parquet", b"PAR1 is not enough", "is not a Parquet file"),
        ("a.parquet", b"", "is not a Parquet file"),
        ("a.parquet", b"PAR1" + b"\xff" * 4 + b"PAR1", "is not a Parquet file"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    line = refusal(tmp_path)
    assert str(tmp_path / name) in line
    assert says in line


def test_a_parquet_file_without_text_is_named(tmp_path: Path) -> None:
    parquet(tmp_path, body=["p"], more=[1])
    assert "a.parquet has no column text (its columns: body, more); name the column" in refusal(tmp_path)
    assert "a.parquet has no column tekst" in refusal(tmp_path, text_field="tekst")
    parquet(tmp_path, text=[1])
    assert "a.parquet, row 1: the field text is not text but int" in refusal(tmp_path)
    pq.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), tmp_path / "a.parquet")
    assert "a.parquet has more than one column text" in refusal(tmp_path)
    pq.write_table(pa.table({"text": ["a"] * 9 + [None]}), tmp_path / "a.parquet", row_group_size=3)
    assert "a.parquet, row 10: the field text is not text but NoneType" in refusal(tmp_path)
    whole = parquet(tmp_path, text=["whole " * 500]).read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[:40] + b"\xff" * 60 + whole[100:])
    assert "a.parquet" in refusal(tmp_path)


def test_text_of_parquet_that_is_not_utf8_names_its_row(tmp_path: Path) -> None:
    path = parquet(tmp_path, text=["fine", "caf?"])
    path.write_bytes(path.read_bytes().replace(b"caf?", b"caf\xe9"))
    assert "a.parquet, row 2: not UTF-8" in refusal(tmp_path)


def test_rows_with_one_id_are_named(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": str(number), "id": "dump\u202e", "key": number} for number in range(3)])
    assert "all 3 documents of" in refusal(tmp_path)
    assert "one id ('dump\\u202e')" in refusal(tmp_path)
    assert "calibration.id_field" in refusal(tmp_path)
    assert len(read_documents(tmp_path, id_field="key")) == 3
    assert len(read_documents(tmp_path, id_field="no such field")) == 3


def test_a_folder_without_documents_is_named(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("nothing here")
    (tmp_path / "blank.txt").write_text("\n")
    assert "holds no document" in refusal(tmp_path)
    assert "is not there" in refusal(tmp_path / "missing")


# --- what is no file, lies elsewhere, or has a name that is no name


@pytest.mark.parametrize("kind", ["file", "file of another kind", "folder", "nothing"])
def test_links_that_leave_the_folder_are_refused(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "domain"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "a.txt").write_text("a")
    name, target = {
        "file": ("b.txt", "../../secret.txt"),
        "file of another kind": ("b.md", "../../secret.txt"),
        "folder": ("b", "/etc"),
        "nothing": ("b.txt", "../../missing"),
    }[kind]
    (folder / "sub" / name).symlink_to(target)
    assert f"{folder}/sub/{name} is a link that leaves the domain's folder: put the file itself" in refusal(folder)


def test_a_link_within_the_folder_is_a_file_and_one_to_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "a.txt").write_text("a")
    (tmp_path / "b.txt").symlink_to("a/a.txt")
    (tmp_path / "c").symlink_to("a")
    (tmp_path / "a" / "loop").symlink_to("..")
    assert [document.identity for document in read_documents(tmp_path)] == ["path:a/a.txt", "path:b.txt"]
    (tmp_path / "d.txt").symlink_to("d.txt")
    assert "d.txt is a link to nothing" in refusal(tmp_path)


def test_the_tasks_of_a_domain_are_none_of_its_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "deep" / "tasks").mkdir(parents=True)
    (tmp_path / "deep" / "tasks" / "b.txt").write_text("b")
    before = list(read_documents(tmp_path))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "questions.jsonl").write_text('{"question": "no text"}')
    assert list(read_documents(tmp_path)) == before
    assert [document.identity for document in before] == ["path:a.txt", "path:deep/tasks/b.txt"]


def test_a_domain_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to("/etc")
    assert refusal(tmp_path / "x").startswith(f"domain folder {tmp_path}/x is a link")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["a.txt", "other"])
def test_what_is_no_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    os.mkfifo(path)
    assert f"{path} is a named pipe" in refusal(tmp_path)
    path.unlink()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        assert f"{path} is a socket" in refusal(tmp_path)
    path.unlink()
    if os.geteuid() == 0:  # others may make no device
        os.mknod(path, 0o20666, os.makedev(1, 5))
        assert f"{path} is a device" in refusal(tmp_path)


@pytest.mark.parametrize("name", [b"caf\xe9.txt", b"\x1b[2J.txt", b"a\nb.md", b"\xe2\x80\xae.txt", b"sub\x07/a.txt"])
def test_a_name_that_could_speak_to_a_terminal_is_refused_in_ascii(tmp_path: Path, name: bytes) -> None:
    path = tmp_path / os.fsdecode(name)
    path.parent.mkdir(exist_ok=True)
    path.write_text("a")
    line = refusal(tmp_path)
    assert "rename it" in line
    assert line.isascii()


# --- memory and time are bounded


@given(st.text(st.sampled_from("aAß \n\t\u00a0e\u0301\u0327ﬁ\u1100\u1161\u11a8가\u3099カ\u2028")), st.integers(1, 8))
def test_a_text_is_normalised_in_pieces_as_in_one(text: str, at_once: int) -> None:
    whole = hashlib.sha256(" ".join(unicodedata.normalize("NFKC", text).casefold().split()).encode()).digest()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "_NORMALISED_AT_ONCE", at_once)
        assert documents._normalised_digest(text) == whole


@pytest.mark.parametrize("ending", ["gz", "zst"])
@pytest.mark.parametrize(
    ("name", "opening", "filling"),
    [("a.txt", b"", b"\0"), ("a.jsonl", b'{"text": "fine"}\n', b"\n"), ("a.jsonl", b'{"text": "', b" ")],
)
def test_bombs_are_refused(tmp_path: Path, name: str, opening: bytes, filling: bytes, ending: str) -> None:
    path = tmp_path / f"{name}.{ending}"
    content = opening + filling * 50_000_000
    path.write_bytes(gzip.compress(content) if ending == "gz" else zstd(content))
    assert f"{path} expands to more than 100 times its size" in refusal(tmp_path)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds a thousandth as large: 256 kB of documents, parts of 16 kB, texts and lines of 32 kB."""
    monkeypatch.setattr(documents, "_MOST", documents._MOST >> 10)
    for module in (documents, parquet_files):
        monkeypatch.setattr(module, "PART", rows.PART >> 10)
    monkeypatch.setattr(text_files, "LONGEST", rows.LONGEST >> 10)
    monkeypatch.setattr(parquet_files, "_LARGEST_ROW", parquet_files._LARGEST_ROW >> 10)


def line(number: int) -> str:
    return f"{number} {'word ' * 30}"


def in_text(folder: Path, count: int) -> None:
    for number in range(count):
        (folder / f"{number}.txt").write_text(line(number))


def in_lines(folder: Path, count: int) -> None:
    write_jsonl(folder / "a.jsonl", [{"text": line(number)} for number in range(count)])


def in_compressed_lines(folder: Path, count: int) -> None:
    in_lines(folder, count)
    path = folder / "a.jsonl"
    (folder / "a.jsonl.zst").write_bytes(zstd(path.read_bytes()))
    path.unlink()


def in_rows(folder: Path, count: int) -> None:
    table = pa.table({"text": [line(number) for number in range(count)], "other": [b"x" * 99] * count})
    pq.write_table(table, folder / "a.parquet", row_group_size=50, use_dictionary=False, compression="none")


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("write", [in_text, in_lines, in_rows])
def test_of_a_large_domain_a_sample_is_read_that_is_the_same_each_time(
    tmp_path: Path, write: Callable[[Path, int], None]
) -> None:
    write(tmp_path, 2000)
    found = read_documents(tmp_path)
    assert found == read_documents(tmp_path)
    numbers = sorted(int(document.text.split()[0]) for document in found)
    assert len(numbers) == len(set(numbers)) == len({document.identity for document in found})
    assert 200 < len(numbers) < 500
    assert numbers[-1] - numbers[0] > 1000  # from all over
    assert all(document.text == line(int(document.text.split()[0])) for document in found)  # each of them whole


@pytest.mark.usefixtures("small")
def test_of_large_compressed_lines_the_beginning_is_read(tmp_path: Path) -> None:
    in_compressed_lines(tmp_path, 5000)
    numbers = [int(document.text.split()[0]) for document in read_documents(tmp_path)]
    assert numbers == list(range(len(numbers)))
    assert 50 < len(numbers) < 200


@pytest.mark.usefixtures("small")
def test_every_line_of_a_large_file_is_in_one_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_lines(tmp_path, 2000)
    monkeypatch.setattr(
        documents, "_taken", lambda found, calls=[]: (calls.append(1), (list(found), len(calls) > 1))[1]
    )
    assert sorted(int(text.split()[0]) for text in texts(tmp_path)) == list(range(2000))


@pytest.mark.usefixtures("small")
def test_a_bad_line_in_the_middle_of_a_large_file_is_named_by_its_place(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = json.dumps({"text": line(1)}) + "\n"
    path.write_text(good * 2000 + "no JSON\n" * 10_000)
    found = refusal(tmp_path)
    place = int(re.findall(r"a\.jsonl, the line at byte (\d+): not JSON", found)[0])
    assert path.read_bytes()[place:].startswith(b"no JSON\n")


@pytest.mark.usefixtures("small")
def test_a_text_is_cut_and_a_line_refused_where_they_are_too_long(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ü" * 20_000)
    assert texts(tmp_path) == ["ü" * 16_384]
    (tmp_path / "a.txt").write_text("x" + "ü" * 20_000)
    assert texts(tmp_path) == ["x" + "ü" * 16_383]
    write_jsonl(tmp_path / "b.jsonl", [{"text": "short"}, {"text": "y" * 40_000}])
    assert "b.jsonl, line 2: longer than" in refusal(tmp_path)


@pytest.mark.usefixtures("small")
def test_rows_of_parquet_that_are_too_large_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    parquet(tmp_path, text=["z" * 150_000])
    assert "a.parquet, row group 0: rows of more than" in refusal(tmp_path)


measurable = pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="memory is read from /proc")
MOST = 500e6  # bytes beside the process


@measurable
def test_a_text_of_a_gigabyte_takes_little(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one line")
    os.truncate(tmp_path / "a.txt", 1 << 30)
    (tmp_path / "b.txt").write_text("another")
    found = measured(reading, tmp_path)
    assert found["documents"] == 2
    assert found["peak"] - found["bare"] < MOST / 2
    assert found["read"] < 40e6


@measurable
def test_many_small_files_take_what_they_hold(tmp_path: Path) -> None:
    for number in range(5000):
        (tmp_path / f"{number}.txt").write_text(f"{number} " * 800)
    found = measured(reading, tmp_path)
    assert found["documents"] == 5000
    assert found["peak"] - found["bare"] < 3 * sum(path.stat().st_size for path in tmp_path.iterdir())


@measurable
def test_parquet_with_a_gigabyte_of_text_takes_what_is_used(tmp_path: Path) -> None:
    """Ten long texts, each ten thousand times: a small file with a dictionary."""
    names = pa.DictionaryArray.from_arrays(pa.array([number % 10 for number in range(10_000)]), ["x" * 10_000] * 10)
    with pq.ParquetWriter(tmp_path / "a.parquet", pa.schema({"text": names.type})) as writer:
        for _ in range(10):
            writer.write_table(pa.table({"text": names}))
    found = measured(reading, tmp_path)
    assert 5000 < found["documents"] < 30_000
    assert found["peak"] - found["bare"] < MOST


@measurable
@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_large_domains_take_less_than_500_mb(tmp_path: Path) -> None:
    for number in range(100_000):
        (tmp_path / "many" / f"{number % 100}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "many" / f"{number % 100}" / f"{number}.txt").write_text(f"{number} " * 250)
    (tmp_path / "rows").mkdir()
    with pq.ParquetWriter(tmp_path / "rows" / "a.parquet", pa.schema({"text": pa.string()})) as writer:
        for _ in range(10):
            table = pa.table({"text": [os.urandom(500).hex() for _ in range(200_000)]})
            writer.write_table(table, row_group_size=200_000)
    (tmp_path / "lines").mkdir()
    with (tmp_path / "lines" / "a.jsonl").open("w") as file:
        for number in range(500_000):
            file.write(json.dumps({"text": f"{number} " * 250, "other": "x" * 2000}) + "\n")
    for folder in tmp_path.iterdir():
        found = measured(reading, folder)
        assert found["peak"] - found["bare"] < MOST
        assert found["read"] < 2e9
