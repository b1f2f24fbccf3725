"""The log of a lineage: a chain that shows every change, anchored in the registry."""

from __future__ import annotations

import copy
import getpass
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

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
from flows.registry.registry import Registry


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


def test_the_registry_keeps_the_log_and_notices_what_was_altered(bench):
    registry = bench.registry
    assert registry.log() == []
    first = registry.append_log("promotion", to_version=1, why="first", details={"alias": "champion"})
    second = registry.append_log("rollback", from_version=1, to_version=1, details={})
    assert bench.registry.log() == [first, second]
    (file,) = bench.workspace.artifacts.rglob("000001-*.json")
    content = file.read_text()
    file.write_text(content.replace('"first"', '"later"'))
    with pytest.raises(LineageError, match=r"log of tiny: log entry 2: does not follow"):
        registry.log()
    file.write_text(content[:20])
    with pytest.raises(LineageError, match="log entry 1"):
        registry.log()
    with pytest.raises(LineageError, match="log entry 1"):
        registry.append_log("rollback", details={})
    file.write_text(content)
    assert len(registry.log()) == 2


def test_an_entry_counts_once_its_anchor_is_there(bench, monkeypatch):
    registry = bench.registry
    registry.append_log("promotion", to_version=1, details={})
    with monkeypatch.context() as patch:
        patch.setattr(registry, "add_entry", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            registry.append_log("rollback", why="killed", details={})
    assert [entry["kind"] for entry in registry.log()] == ["promotion"]
    registry.append_log("rollback", why="again", details={})
    assert [entry["why"] for entry in registry.log()] == [None, "again"]


def test_nothing_is_lost_where_eight_append_at_once_through_the_server(mlflow_server, tmp_path):
    barrier = threading.Barrier(8)

    def work(number: int) -> list[dict]:
        registry = Registry(mlflow_server.uri, tmp_path / "artifacts", "logged", tmp_path / "cache")
        barrier.wait()
        return [registry.append_log("purge", why=f"{number}/{turn}", details={}) for turn in range(3)]

    with ThreadPoolExecutor(8) as pool:
        appended = [entry for of_one in pool.map(work, range(8)) for entry in of_one]
    registry = Registry(mlflow_server.uri, tmp_path / "artifacts", "logged", tmp_path / "cache")
    assert registry.log() == sorted(appended, key=lambda entry: entry["number"])
    assert len({entry["why"] for entry in appended}) == 24
    assert len(registry.entries("log")) <= 2  # passed ones go


@pytest.mark.parametrize("others", [1, 2])
def test_one_that_was_held_up_before_it_got_its_number_takes_the_next(bench, monkeypatch, others):
    late, real = bench.registry, Registry.add_entry

    def held_up(self, kind, number, values):
        monkeypatch.setattr(Registry, "add_entry", real)
        for turn in range(others):  # in the meantime; of two, the second deletes the name of the first
            bench.registry.append_log("purge", why=f"in time {turn}", details={})
        return real(self, kind, number, values)

    monkeypatch.setattr(Registry, "add_entry", held_up)
    entry = late.append_log("purge", why="late", details={})
    assert entry["number"] == others + 1
    assert [each["why"] for each in bench.registry.log()] == [f"in time {turn}" for turn in range(others)] + ["late"]


def test_one_that_was_followed_at_once_knows_that_it_was_appended(bench, monkeypatch):
    first, real = bench.registry, Registry.entries

    def looks_late(self, kind):
        if self is first and kind == "log" and real(self, kind):
            monkeypatch.setattr(Registry, "entries", real)
            bench.registry.append_log("purge", why="second", details={})
        return real(self, kind)

    monkeypatch.setattr(Registry, "entries", looks_late)
    assert first.append_log("purge", why="first", details={})["number"] == 1
    assert [entry["why"] for entry in bench.registry.log()] == ["first", "second"]


def test_the_log_of_a_remote_store_is_fetched(bench, monkeypatch):
    written = bench.registry.append_log("promotion", to_version=1, details={"alias": "champion"})
    monkeypatch.setattr("flows.registry.registry._local_path", lambda uri: None)
    assert bench.registry.log() == [written]
    assert json.dumps(bench.registry.log_as_stored()[0]) == json.dumps([written])


def test_the_published_schema_knows_every_kind_of_entry():
    assert schema_of("copal.log/1")["properties"]["kind"]["enum"] == list(KINDS)
    broken = three()
    broken[1]["kind"] = "party"
    (problem, *_) = log_problems(broken, anchor_of(broken))
    assert problem == ("log entry 2: kind must be one of gates, promotion, rollback, withdrawal and purge, not 'party'")
