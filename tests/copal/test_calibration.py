from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from copal.calibration import domain_windows
from copal.config import CalibrationConfig
from copal.documents import Document, read_documents, split_documents
from copal.errors import DataError
from support.text import byte_tokenizer, write_jsonl

SMALL = CalibrationConfig(window_length=16, windows=10, evaluation_windows=8)


def domain(folder: Path, texts: dict[str, str]) -> Path:
    write_jsonl(folder / "documents.jsonl", [{"id": identity, "text": text} for identity, text in texts.items()])
    return folder


def many(count: int, length: int) -> dict[str, str]:
    return {f"d{number}": f"{number:04d}" * (length // 4) for number in range(count)}


# sides

documents_st = st.dictionaries(st.text(max_size=6), st.text(min_size=1, max_size=6), max_size=30).map(
    lambda texts: [Document(identity=f"id:{identity}", text=text) for identity, text in texts.items()]
)
shares = st.floats(min_value=0.05, max_value=0.95)


def normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


@given(documents_st, shares)
def test_every_text_is_on_exactly_one_side_once(documents: list[Document], share: float) -> None:
    calibration, evaluation = split_documents(documents, share)
    texts = [normalised(document.text) for document in calibration + evaluation]
    assert sorted(texts) == sorted({normalised(document.text) for document in documents})


@given(documents_st, shares)
def test_a_text_that_is_evaluated_anywhere_is_kept_from_calibration(documents: list[Document], share: float) -> None:
    calibration, _ = split_documents(documents, share)
    alone = {document.identity: split_documents([document], share)[1] for document in documents}
    held_out = {normalised(document.text) for document in documents if alone[document.identity]}
    assert held_out.isdisjoint(normalised(document.text) for document in calibration)


@given(st.dictionaries(st.text(max_size=6), st.integers(), min_size=1, max_size=30), st.data(), shares)
def test_no_document_moves_when_another_is_edited_or_added(
    numbers: dict[str, int], data: st.DataObject, share: float
) -> None:
    # texts are distinct, by their identity
    documents = [Document(identity=identity, text=f"{identity!r} {number}") for identity, number in numbers.items()]
    edited = data.draw(st.sampled_from(documents))
    changed = [
        Document(identity=edited.identity, text=edited.text + " edited") if document == edited else document
        for document in documents
    ]
    changed.insert(0, Document(identity="added " * 3, text="added text"))

    before, after = split_documents(documents, share), split_documents(changed, share)

    for side in (0, 1):
        identities = {document.identity for document in after[side]} - {"added " * 3}
        assert {document.identity for document in before[side]} == identities
    assert split_documents(changed[::-1], share) == after  # nor does the order in which they are read matter


def test_about_the_share_is_held_out() -> None:
    documents = [Document(identity=f"id:{number}", text=str(number)) for number in range(2000)]
    _, evaluation = split_documents(documents, 0.2)
    assert 340 < len(evaluation) < 460


# windows


def test_windows_are_whole_and_start_with_bos(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    made = domain_windows(domain(tmp_path, many(200, 8)), tokenizer, SMALL)

    assert made.calibration.shape == (10, 16)
    assert made.evaluation.shape == (8, 16)
    assert made.calibration.dtype == torch.int64
    assert made.calibration_documents + made.evaluation_documents == 200
    for windows in (made.calibration, made.evaluation):
        assert (windows[:, 0] == tokenizer.bos_token_id).all()
        assert (windows[:, 1:] != tokenizer.bos_token_id).all()
    first = tokenizer.decode(made.calibration[0])
    assert first[3:11] in many(200, 8).values()  # "<s>", a whole short document,
    assert first[11:15] == "</s>"  # then the joint


def test_calibration_and_evaluation_share_no_text(tmp_path: Path) -> None:
    texts = {f"d{number}": chr(0x4E00 + number) * 30 for number in range(100)}  # a letter of its own for each document
    tokenizer = byte_tokenizer(bos=None, eos=None)
    made = domain_windows(domain(tmp_path, texts), tokenizer, SMALL)
    letters = [
        {letter for window in windows for letter in tokenizer.decode(window) if letter != "\ufffd"}
        for windows in (made.calibration, made.evaluation)
    ]
    assert letters[0]
    assert letters[1]
    assert letters[0].isdisjoint(letters[1])


def test_without_bos_and_eos_a_window_is_all_text(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(bos=None, eos=None)
    made = domain_windows(domain(tmp_path, many(200, 8)), tokenizer, SMALL)
    assert made.calibration.shape == (10, 16)
    assert tokenizer.decode(made.calibration[0]).isdigit()


def test_the_same_domain_gives_the_same_windows_however_it_is_stored(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    texts = many(200, 40)
    one = domain_windows(domain(tmp_path / "one", texts), tokenizer, SMALL)
    backwards = dict(reversed(texts.items()))
    two = domain_windows(domain(tmp_path / "two" / "deeper", backwards).parent, tokenizer, SMALL)
    other = domain_windows(tmp_path / "one", tokenizer, CalibrationConfig(window_length=16, windows=10, seed=1))

    assert torch.equal(one.calibration, two.calibration)
    assert one.calibration_digest == two.calibration_digest
    assert one.evaluation_digest == two.evaluation_digest
    assert one.calibration_digest != one.evaluation_digest
    assert one.calibration_digest != other.calibration_digest
    assert one.calibration_documents == other.calibration_documents  # the seed moves no document


def test_the_digest_is_pinned(tmp_path: Path) -> None:
    """Versions are compared by it across machines and releases: it may only change on purpose."""
    made = domain_windows(domain(tmp_path, many(200, 8)), byte_tokenizer(), SMALL)
    assert made.calibration_digest == "39c55765c31c01ff591c9bc894551c70e9380cb89e6987d616dcaad63131d5aa"


def test_windows_of_every_format_are_pinned(tmp_path: Path) -> None:
    """Those of before formats were read by hand: bytes that only one kind of reader minds must not change them."""
    drawn = [f"{number} Straße ﬁne\u00a0東京 A\u030a {'x' * (number % 41)}" for number in range(240)]
    for number, text in enumerate(drawn[:60]):
        end = ("\n", "\r\n", "\r")[number % 3]
        opening = "\ufeff" if number % 7 == 0 else ""
        path = tmp_path / f"t{number % 4}" / f"{number}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(f"{opening}{text}{end}{text.upper()}{end}".encode())
    ids = (7, "seven", "", None, "ü")
    rows = [{"text": text, "id": ids[number % 5], "m": [1]} for number, text in enumerate(drawn[60:160])]
    lines = "\r\n\r".join(json.dumps(row, ensure_ascii=number % 2 == 0) for number, row in enumerate(rows))
    (tmp_path / "rows.jsonl").write_bytes(f"\ufeff{lines}\r".encode())
    table = pa.table({"text": drawn[150:], "id": [None if number % 3 else f"p{number}" for number in range(90)]})
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=17)

    made = domain_windows(tmp_path, byte_tokenizer(), CalibrationConfig(window_length=64, windows=80))

    assert (made.calibration_documents, made.evaluation_documents) == (204, 36)
    assert made.calibration_digest[:16] == "6841523b21ce8944"
    assert made.evaluation_digest[:16] == "100dab116e1e4a2a"


def test_a_long_document_gives_way_to_the_others(tmp_path: Path) -> None:
    texts = {"long": "x" * 100_000, **many(100, 40)}
    made = domain_windows(domain(tmp_path, texts), byte_tokenizer(), SMALL)
    with_long = [window for window in made.calibration if "x" in byte_tokenizer().decode(window)]
    assert len(with_long) <= 1


def test_documents_take_further_turns_until_all_text_is_used(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(bos=None, eos=None)
    texts = {f"d{number}": f"{chr(0x61 + number % 26)}" * (500 + number) for number in range(26)}
    wanted = CalibrationConfig(window_length=16, windows=10_000, evaluation_windows=10_000)
    made = domain_windows(domain(tmp_path, texts), tokenizer, wanted)

    calibration, evaluation = split_documents(read_documents(tmp_path), wanted.evaluation_share)
    for windows, documents in ((made.calibration, calibration), (made.evaluation, evaluation)):
        total = sum(len(document.text) for document in documents)
        assert len(windows) == total // 16
        used = tokenizer.decode(windows.flatten())
        for document in documents:  # nothing is read twice, and at most the last window's worth is left over
            assert len(document.text) - 16 < used.count(document.text[0]) <= len(document.text)


def test_text_between_slices_is_neither_lost_nor_doubled(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(bos=None, eos=None)
    texts = {f"d{number}": " ".join(f"{number}:{word}" for word in range(400)) for number in range(12)}
    wanted = CalibrationConfig(window_length=16, windows=10_000, evaluation_windows=10_000)
    made = domain_windows(domain(tmp_path, texts), tokenizer, wanted)
    calibration, _ = split_documents(read_documents(tmp_path), wanted.evaluation_share)
    used = sorted(tokenizer.decode(made.calibration.flatten()))
    there = sorted("".join(document.text for document in calibration))
    assert 0 <= len(there) - len(used) < 16


class _Counting:
    """A tokenizer that counts the characters it is given."""

    def __init__(self) -> None:
        self._tokenizer = byte_tokenizer()
        self.bos_token_id, self.eos_token_id = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        self.characters = 0

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        self.characters += len(text)
        return {"input_ids": self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]}


def test_only_the_text_that_is_needed_is_tokenised(tmp_path: Path) -> None:
    texts = {f"d{number}": f"{number} word " * 20_000 for number in range(40)}  # 8 MB
    counting = _Counting()
    made = domain_windows(domain(tmp_path, texts), counting, SMALL)  # type: ignore[arg-type]
    assert len(made.calibration) == 10
    assert counting.characters < 20 * 8 * 16 + 1000


def test_too_little_text_names_the_folder_and_what_is_needed(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(DataError) as caught:
        domain_windows(domain(tmp_path / "one", {"a": "b" * 5000}), tokenizer, SMALL)
    assert str(tmp_path / "one") in str(caught.value)
    assert "0 tokens in 0 documents for" in str(caught.value)
    assert "120 are needed (8 windows of 16)" in str(caught.value)

    with pytest.raises(DataError, match=r"for evaluation, and 120 are needed"):
        domain_windows(domain(tmp_path / "two", many(30, 12)), tokenizer, SMALL)


def test_few_calibration_windows_may_be_asked_for(tmp_path: Path) -> None:
    few = CalibrationConfig(window_length=16, windows=2)
    made = domain_windows(domain(tmp_path, many(200, 8)), byte_tokenizer(), few)
    assert len(made.calibration) == 2
