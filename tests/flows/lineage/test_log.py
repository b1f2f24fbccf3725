"""The log of a lineage: a chain that shows every change, anchored in the registry."""

from __future__ import annotations

import copy
import getpass
import json
import re
import socket
from typing import Any

import pytest

from copal.config import fingerprint
from flows.lineage.chain import (
    anchor_of,
    anchor_problems,
    chain_problems,
    entries_of,
    log_problems,
    not_anchored,
)
from flows.lineage.entries import (
    Entry,
    GateResult,
    GatesDetails,
    PurgeDetails,
    Who,
    WithdrawalDetails,
    next_entry,
    parse_entry,
    who_text,
    writer,
)
from flows.lineage.record import LineageError
from flows.project import append_log, complete_log, hold_lineage
from support.histories import MOVED
from support.toys import altered_entry, documents

PURGED = PurgeDetails(domain="code", dvc_md5="a" * 32, deleted=(2,), traces=(2, 3))
JUDGED = GatesDetails(
    record="a" * 64,
    passed=True,
    promote="manual",
    gates=(GateResult(name="dense", passed=True, value=1.5, limit=2, detail="fine"),),
)


def three() -> list[Entry]:
    entries: list[Entry] = []
    for number in (2, 3, 4):
        who = writer("copal_worker")
        entries.append(next_entry(entries, kind="gates", who=who, version=number, why="because", details=JUDGED))
    return entries


def stored(entries: list[Entry]) -> list[Any]:
    return [entry.as_json() for entry in entries]


def test_a_whole_log_has_no_problems():
    entries = three()
    assert log_problems(stored(entries), anchor_of(entries)) == []
    assert log_problems([], "") == []
    assert entries_of(stored(entries)) == entries
    assert [entry.number for entry in entries] == [1, 2, 3]
    assert entries[0].who == Who(role="copal_worker", user=getpass.getuser(), host=socket.gethostname())


def test_the_digest_of_an_entry_is_that_of_its_plain_json():
    entry = {
        "schema": "copal.log/1", "number": 1, "previous": None, "kind": "gates", "when": "2026-01-02T03:04:05+00:00",
        "who": {"role": None, "user": "ada", "host": "host"}, "why": None, "version": 2, "from": None, "to": 2,
        "details": {
            "record": "a" * 64, "passed": True, "promote": "manual",
            "gates": [{"name": "dense", "passed": True, "value": 1.5, "limit": 2, "detail": "fine"}],
        },
    }  # fmt: skip
    read = parse_entry(json.loads(json.dumps(entry)), "here")
    assert read.details == JUDGED
    assert read.digest == fingerprint(entry) == "09c7210bc418030f2a924e0f41bdbb4d5de88017245e6dd77291da3eb6e5ef9e"


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("field", sorted(stored(three())[0]))
def test_a_change_of_any_field_of_any_entry_is_seen(place, field):
    entries = three()
    anchor = anchor_of(entries)
    altered = copy.deepcopy(stored(entries))
    values = {"number": 7, "version": 9, "from": 1, "to": 1, "kind": "purge", "why": None}
    values["details"] = altered[place]["details"] | {"passed": False}
    values["who"] = altered[place]["who"] | {"role": None}
    altered[place][field] = values.get(field, "another")
    assert altered != stored(entries)
    assert log_problems(altered, anchor)


@pytest.mark.parametrize("kept", [[], [0], [0, 1], [1, 2], [0, 2], [1, 0, 2], [0, 1, 2, 2]])
def test_entries_that_are_missing_moved_or_doubled_are_seen(kept):
    values = stored(three())
    anchor = f"3 {fingerprint(values[2])}"
    assert log_problems([values[place] for place in kept], anchor)


def test_an_entry_that_is_not_there_is_named():
    values = stored(three())
    values[1] = None
    assert chain_problems(values)[0] == "log entry 2: is missing"


def test_who_wrote_an_entry_in_words():
    assert who_text(Who(role=None, user="ada", host="host")) == "ada@host"
    assert who_text(Who(role="copal_promoter", user="ada", host="host")) == "role copal_promoter (ada@host)"


@pytest.mark.parametrize("who", ["ada@host", {"user": "ada", "host": "host"}, {"role": "", "user": "a", "host": "h"}])
def test_who_wrote_an_entry_has_a_fixed_form(who):
    value = three()[0].as_json() | {"who": who}
    (problem,) = log_problems([value], "")
    assert problem.startswith("log entry 1: who")


def test_entries_after_the_anchored_one_are_only_not_anchored_yet():
    entries = three()
    for place in range(4):
        anchor = anchor_of(entries[:place])
        assert log_problems(stored(entries), anchor) == []
        assert not_anchored(stored(entries), anchor) == 3 - place


def test_an_anchor_that_the_log_does_not_fit_is_seen():
    entries = three()
    anchor, values = anchor_of(entries), stored(entries)
    (cut,) = anchor_problems(values[:2], anchor)
    assert cut == "the log has 2 entries, its anchor in the registry names entry 3: it was cut off"
    (cut,) = anchor_problems([], anchor)
    assert "has 0 entries" in cut
    (rewritten,) = anchor_problems([*values[:2], values[2] | {"why": "another"}], anchor)
    assert rewritten.startswith("log entry 3: is not the one that the anchor in the registry names")
    assert anchor_problems([*values[:2], None], anchor)
    for broken in ("3", "many", f"0 {'0' * 64}", f"{anchor} ", f"-1 {'0' * 64}"):
        (problem,) = anchor_problems(values, broken)
        assert "somebody altered it" in problem
        assert not_anchored(values, broken) == 3


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"kind": "party"}, "kind must be one of gates, promotion, rollback, withdrawal and purge, not 'party'"),
        ({"kind": ["gates"]}, "kind must be one of gates, promotion, rollback, withdrawal and purge, not ['gates']"),
        ({"kind": "purge"}, "version must be null, not 2"),
        ({"kind": "rollback"}, "to must be a whole number of at least 0, not None"),
        ({"schema": "copal.log/0"}, "schema must be 'copal.log/1', not 'copal.log/0'"),
        ({"number": 0}, "number must be a whole number of at least 1, not 0"),
        ({"number": 1.0}, "number must be a whole number of at least 1, not 1.0"),
        ({"version": None}, "version must be a whole number of at least 0, not None"),
        ({"previous": "0"}, "previous must be a SHA-256 in hexadecimal or null, not '0'"),
        ({"when": "today"}, "when must be a UTC time in ISO 8601, not 'today'"),
        ({"more": 1}, "more is not a field of it"),
        ({"details": {}}, "details.record is missing"),
        ({"details": JUDGED.as_json() | {"passed": 1}}, "details.passed must be true or false, not 1"),
        ({"details": JUDGED.as_json() | {"gates": [{}]}}, "details.gates[0].name is missing"),
    ],
)
def test_what_breaks_an_entry_is_told_in_one_line(change, problem):
    value = three()[0].as_json() | change
    assert chain_problems([value]) == [f"log entry 1: {problem}"]
    with pytest.raises(LineageError, match=re.escape(problem)):
        parse_entry(value, "here")


@pytest.mark.parametrize("value", ["text", 3, [], {}, float("nan")])
def test_what_is_no_entry_is_told(value):
    (problem,) = chain_problems([value])
    assert problem.startswith("log entry 1: ")


def test_details_that_are_of_another_kind_do_not_become_an_entry():
    with pytest.raises(LineageError, match=r"^log entry 1: details\."):
        next_entry([], kind="purge", who=writer(None), details=WithdrawalDetails(domain="code", dvc_md5="a"))
    with pytest.raises(LineageError, match="kind must be one of"):
        next_entry([], kind="party", who=writer(None), details=PURGED)


def test_what_was_altered_in_the_ledger_is_noticed_and_nothing_is_appended_to_it(bench):
    first = append_log(bench.project, "promotion", version=1, to_version=1, why="first", details=MOVED)
    second = append_log(bench.project, "rollback", version=1, from_version=1, to_version=1, details=MOVED)
    assert bench.log == [first, second]
    content = documents(bench.project)[0]
    for text, said in (
        (content.replace('"first"', '"later"'), "log entry 1: "),
        (content[:20], "log entry 1: "),
        (None, "log entry 1: is missing"),
    ):
        with altered_entry(bench.project, 1, text), pytest.raises(LineageError, match=said):
            append_log(bench.project, "purge", details=PURGED)
    with altered_entry(bench.project, 2, None), pytest.raises(LineageError, match="it was cut off"):
        append_log(bench.project, "purge", details=PURGED)  # else the anchor would name the new entry
    assert bench.log == [first, second]


def test_an_entry_that_a_kill_left_without_its_anchor_counts_and_is_anchored_by_the_next_holder(bench):
    append_log(bench.project, "promotion", version=1, to_version=1, details=MOVED)
    anchor = bench.registry.log_anchor()
    bench.project.ledger.append("purge", why="killed", details=PURGED)
    assert [entry.kind for entry in bench.log] == ["promotion", "purge"]
    assert (bench.registry.log_anchor(), not_anchored(bench.log, anchor)) == (anchor, 1)
    with hold_lineage(bench.project, "next"):
        project = bench.project
        assert complete_log(project) == bench.log
    assert bench.registry.log_anchor() == anchor_of(bench.log)
