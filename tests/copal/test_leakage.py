from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from copal.calibration import domain_windows, text_read
from copal.config import CalibrationConfig
from copal.documents import hash64
from copal.errors import DataError
from copal.leakage import LeftOut, repeats, shingles_of
from support.text import byte_tokenizer, write_jsonl

pytestmark = pytest.mark.quick

SMALL = CalibrationConfig(window_length=256, windows=60, evaluation_windows=60, evaluation_share=0.5, overlap_limit=0.9)
TOKENIZER = byte_tokenizer()


def prose(seed: int, words: int = 60) -> str:
    drawn = random.Random(seed)
    return " ".join("".join(drawn.choices("abcdefghij", k=drawn.randint(2, 8))) for _ in range(words))


def known(text: str):
    return shingles_of([text])


def test_a_text_repeats_itself_however_it_is_spaced_and_written() -> None:
    text = prose(0)
    assert repeats(text, known(text))
    assert repeats(text.upper().replace(" ", " \n\t"), known(text))
    assert repeats(f"{prose(1, 20)} {text}", known(text))


def test_a_near_duplicate_is_found_and_half_of_another_text_is_not_enough() -> None:
    text = prose(0, 120)
    words = text.split()
    edited = " ".join("changed" if place in (40, 80) else word for place, word in enumerate(words))
    assert repeats(edited, known(text))
    assert not repeats(f"{' '.join(words[:40])} {prose(1, 80)}", known(text))


def test_a_long_passage_in_a_much_longer_text_is_found() -> None:
    passage = prose(0, 250)
    assert len(passage) > 1100
    assert repeats(f"{prose(1, 3000)} {passage} {prose(2, 3000)}", known(passage))


def test_languages_without_spaces_count_too() -> None:
    letters = [chr(0x4E00 + number) for number in range(500)]
    text = "".join(random.Random(0).choices(letters, k=300))
    other = "".join(random.Random(1).choices(letters, k=300))
    assert repeats(text[20:], known(text))
    assert not repeats(other, known(text))


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_texts_that_have_nothing_in_common_do_not_repeat_each_other(one: int, two: int) -> None:
    assert repeats(prose(one), known(prose(two))) == (one == two)


def test_nothing_is_repeated_where_nothing_is_known_or_the_text_is_short() -> None:
    assert not repeats(prose(0), shingles_of([]))
    assert not repeats("too short to say", known("too short to say"))


def write(folder: Path, ids: str, texts: list[str]) -> Path:
    write_jsonl(folder / "documents.jsonl", [{"id": f"{ids}{n}", "text": text} for n, text in enumerate(texts)])
    return folder


@pytest.fixture
def shared(tmp_path: Path) -> tuple[Path, Path]:
    """Two domains of 120 documents; ten of the second are of the first, under other ids."""
    texts = [prose(number) for number in range(240)]
    return write(tmp_path / "one", "a", texts[:120]), write(tmp_path / "two", "b", texts[110:230])


def test_what_evaluates_one_domain_does_not_calibrate_another_and_the_other_way_round(shared) -> None:
    first, second = shared
    one = domain_windows(first, TOKENIZER, SMALL)
    others = text_read([one])
    naive = domain_windows(second, TOKENIZER, SMALL)
    two = domain_windows(second, TOKENIZER, SMALL, others=others)

    def crossing(made) -> int:
        mine = text_read([made])
        return sum(
            len(set(mine_side.tolist()) & set(other_side.tolist()))
            for mine_side, other_side in ((mine.calibration, others.evaluation), (mine.evaluation, others.calibration))
        )

    assert crossing(naive) > 100
    assert crossing(two) == 0
    assert not one.left_out
    texts = {f"{hash64(f'id:b{number}'):016x}" for number in range(10)}
    assert 0 < len(two.left_out) <= 10
    assert {*two.left_out.calibration, *two.left_out.evaluation} <= texts


def test_windows_stay_when_the_domains_that_something_was_left_out_for_are_gone(shared) -> None:
    first, second = shared
    others = text_read([domain_windows(first, TOKENIZER, SMALL)])
    two = domain_windows(second, TOKENIZER, SMALL, others=others)
    again = domain_windows(second, TOKENIZER, SMALL, left_out=two.left_out)
    assert (again.calibration_digest, again.evaluation_digest) == (two.calibration_digest, two.evaluation_digest)
    assert again.left_out == two.left_out
    assert domain_windows(second, TOKENIZER, SMALL).evaluation_digest != two.evaluation_digest


def test_the_same_documents_with_the_same_ids_leak_nothing(tmp_path: Path) -> None:
    texts = [prose(number) for number in range(120)]
    one, two = write(tmp_path / "one", "a", texts), write(tmp_path / "two", "a", texts)
    others = text_read([domain_windows(one, TOKENIZER, SMALL)])
    assert domain_windows(two, TOKENIZER, SMALL, others=others).left_out == LeftOut()


def test_too_much_in_common_is_refused_with_the_figures(tmp_path: Path) -> None:
    texts = [prose(number) for number in range(120)]
    one, two = write(tmp_path / "one", "a", texts), write(tmp_path / "two", "b", texts)
    strict = CalibrationConfig(window_length=256, windows=60, evaluation_windows=60, evaluation_share=0.5)
    others = text_read([domain_windows(one, TOKENIZER, strict)])
    with pytest.raises(DataError, match=r"two: \d+ of \d+ documents for calibration repeat .*overlap_limit \(0\.25\)"):
        domain_windows(two, TOKENIZER, strict, others=others)
