"""The log of a lineage: a chain that shows every change, anchored in the registry."""

from __future__ import annotations

import copy
import getpass
import socket

import pytest

from flows.lineage.entries import (
    KINDS,
    anchor_of,
    anchor_problems,
    log_problems,
    next_entry,
    not_anchored,
    who_text,
    writer,
)
from flows.lineage.record import LineageError
from flows.lineage.schema import schema_of
from flows.project import append_log, complete_log, hold_lineage
from support.toys import altered_entry, documents


def three() -> list[dict]:
    entries: list[dict] = []
    for number in (2, 3, 4):
        details = {"gates": [{"name": "sparsity", "passed": True, "value": 0.5}]}
        entries.append(
            next_entry(
                entries, kind="gates", who=writer("copal_worker"), version=number, why="because", details=details
            )
        )
    return entries


def test_a_whole_log_has_no_problems():
    entries = three()
    assert log_problems(entries, anchor_of(entries)) == []
    assert log_problems([], "") == []
    assert [entry["number"] for entry in entries] == [1, 2, 3]
    assert entries[0]["who"] == {"role": "copal_worker", "user": getpass.getuser(), "host": socket.gethostname()}


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("field", sorted(three()[0]))
def test_a_change_of_any_field_of_any_entry_is_seen(place, field):
    entries = three()
    anchor = anchor_of(entries)
    altered = copy.deepcopy(entries)
    values = {"number": 7, "version": 9, "from": 1, "to": 1, "details": {"gates": []}, "kind": "purge", "why": None}
    values["who"] = entries[place]["who"] | {"role": None}
    altered[place][field] = values.get(field, "another")
    assert altered != entries
    assert log_problems(altered, anchor)


@pytest.mark.parametrize("kept", [[], [0], [0, 1], [1, 2], [0, 2], [1, 0, 2], [0, 1, 2, 2]])
def test_entries_that_are_missing_moved_or_doubled_are_seen(kept):
    entries = three()
    assert log_problems([entries[place] for place in kept], anchor_of(entries))


def test_who_wrote_an_entry_in_words():
    who = {"role": None, "user": "ada", "host": "host"}
    assert who_text(who) == "ada@host"
    assert who_text(who | {"role": "copal_promoter"}) == "role copal_promoter (ada@host)"


@pytest.mark.parametrize("who", ["ada@host", {"user": "ada", "host": "host"}, {"role": "", "user": "a", "host": "h"}])
def test_who_wrote_an_entry_has_a_fixed_form(who):
    entry = three()[0] | {"who": who}
    (problem,) = log_problems([entry], "")
    assert problem.startswith("log entry 1: who")


def test_entries_after_the_anchored_one_are_only_not_anchored_yet():
    entries = three()
    for place in range(4):
        anchor = anchor_of(entries[:place])
        assert anchor_problems(entries, anchor) == []
        assert not_anchored(entries, anchor) == 3 - place


def test_an_anchor_that_the_log_does_not_fit_is_seen():
    entries = three()
    anchor = anchor_of(entries)
    (cut,) = anchor_problems(entries[:2], anchor)
    assert cut == "the log has 2 entries, its anchor in the registry names entry 3: it was cut off"
    (cut,) = anchor_problems([], anchor)
    assert "has 0 entries" in cut
    (rewritten,) = anchor_problems([*entries[:2], entries[2] | {"why": "another"}], anchor)
    assert rewritten.startswith("log entry 3: is not the one that the anchor in the registry names")
    assert anchor_problems([*entries[:2], None], anchor)
    for broken in ("3", "many", f"0 {'0' * 64}", f"{anchor} ", f"-1 {'0' * 64}"):
        (problem,) = anchor_problems(entries, broken)
        assert "somebody altered it" in problem
        assert not_anchored(entries, broken) == 3


def test_what_was_altered_in_the_ledger_is_noticed_and_nothing_is_appended_to_it(bench):
    first = append_log(bench.project, "promotion", to_version=1, why="first", details={"alias": "champion"})
    second = append_log(bench.project, "rollback", from_version=1, to_version=1, details={})
    assert bench.log == [first, second]
    content = documents(bench.project)[0]
    for text, said in (
        (content.replace('"first"', '"later"'), "log entry 1: "),
        (content[:20], "log entry 1: "),
        (None, "log entry 1: is missing"),
    ):
        with altered_entry(bench.project, 1, text), pytest.raises(LineageError, match=said):
            append_log(bench.project, "rollback", details={})
    with altered_entry(bench.project, 2, None), pytest.raises(LineageError, match="it was cut off"):
        append_log(bench.project, "rollback", details={})  # else the anchor would name the new entry
    assert bench.log == [first, second]


def test_an_entry_that_a_kill_left_without_its_anchor_counts_and_is_anchored_by_the_next_holder(bench):
    append_log(bench.project, "promotion", to_version=1, details={})
    anchor = bench.registry.log_anchor()
    bench.project.ledger.append("rollback", why="killed", details={})
    assert [entry["kind"] for entry in bench.log] == ["promotion", "rollback"]
    assert (bench.registry.log_anchor(), not_anchored(bench.log, anchor)) == (anchor, 1)
    with hold_lineage(bench.project, "next"):
        project = bench.project
        assert complete_log(project) == bench.log
    assert bench.registry.log_anchor() == anchor_of(bench.log)


def test_the_published_schema_knows_every_kind_of_entry():
    assert schema_of("copal.log/1")["properties"]["kind"]["enum"] == list(KINDS)
    broken = three()
    broken[1]["kind"] = "party"
    (problem, *_) = log_problems(broken, anchor_of(broken))
    assert problem == ("log entry 2: kind must be one of gates, promotion, rollback, withdrawal and purge, not 'party'")
