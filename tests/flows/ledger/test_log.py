"""The log in the ledger: nothing is lost, and every change of what is stored is seen."""

from __future__ import annotations

import getpass
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy.exc import IntegrityError

from copal.config import canonical_json, fingerprint
from flows.ledger import Ledger, LogMovedError, entries
from flows.lineage.chain import anchor_at, anchor_of, anchor_problems, chain_problems, not_anchored
from flows.lineage.entries import Entry, MoveDetails, parse_entry
from flows.lineage.record import LineageError
from support.ledgers import PURGED, append_at_once, rows, run_sql, together


@pytest.fixture
def three(ledger) -> list[Entry]:
    details = MoveDetails(alias="champion ü\u0000\u2028", forced=False, gates=None, logged_before=None)
    return [
        ledger.append("promotion", version=2, to_version=2, why="first", details=details),
        ledger.append("promotion", version=3, from_version=2, to_version=3, details=details),
        ledger.append("rollback", version=2, from_version=3, to_version=2, why="worse", details=details),
    ]


def test_the_log_is_what_was_appended(ledger, uri, three):
    assert ledger.log() == Ledger(uri, "tiny").log() == three
    assert ledger.log_as_stored() == [entry.as_json() for entry in three]
    assert [entry.number for entry in three] == [1, 2, 3]
    assert Ledger(uri, "another").log() == []
    stored = rows(uri, "SELECT * FROM entries ORDER BY number")
    assert [row["document"] for row in stored] == [canonical_json(entry.as_json()).decode() for entry in three]
    assert [row["digest"] for row in stored] == [fingerprint(entry.as_json()) for entry in three]


def test_an_entry_tells_who_wrote_it(ledger, uri):
    role = "copal" if uri.startswith("postgresql") else None
    who = ledger.append("purge", details=PURGED).who
    assert who.as_json() == {"role": role, "user": getpass.getuser(), "host": socket.gethostname()}


def test_of_postgresql_the_role_is_that_of_who_logged_in(postgresql):
    database, role = postgresql.new_database(), postgresql.new_role()
    Ledger(postgresql.uri(database), "tiny").append("purge", details=PURGED)
    run_sql(postgresql.uri(database), f"GRANT SELECT, INSERT ON ALL TABLES IN SCHEMA public TO {role}")
    assert Ledger(postgresql.uri(database, role), "tiny").append("purge", details=PURGED).who.role == role


def test_nothing_is_lost_where_eight_threads_append_at_once(uri):
    barrier = threading.Barrier(8)

    def work(number: int) -> list[Entry]:
        ledger = Ledger(uri, "raced")
        barrier.wait()
        return [ledger.append("purge", why=f"{number}/{turn}", details=PURGED) for turn in range(3)]

    with ThreadPoolExecutor(8) as pool:
        appended = [entry for of_one in pool.map(work, range(8)) for entry in of_one]
    assert Ledger(uri, "raced").log() == sorted(appended, key=lambda entry: entry.number)
    assert len({entry.why for entry in appended}) == 24


def test_nothing_is_lost_where_eight_processes_make_the_ledger_and_append_at_once(uri):
    together(append_at_once, 8, uri, 3)
    whys = sorted(entry.why for entry in Ledger(uri, "raced").log())
    assert whys == sorted(f"{number}/{turn}" for number in range(8) for turn in range(3))


def test_one_whose_number_another_got_takes_the_next(postgresql, monkeypatch):
    """On SQLite a transaction that writes is alone, so this cannot be."""
    uri = postgresql.uri(postgresql.new_database())
    ledger, other, real = Ledger(uri, "tiny"), Ledger(uri, "tiny"), entries.read
    ledger.append("purge", why="before", details=PURGED)

    def held_up(connection, lineage):
        found = real(connection, lineage)
        monkeypatch.setattr(entries, "read", real)
        other.append("purge", why="in time", details=PURGED)
        return found

    monkeypatch.setattr(entries, "read", held_up)
    late = ledger.append("purge", why="late", details=PURGED)
    assert late.number == 3
    assert [entry.why for entry in ledger.log()] == ["before", "in time", "late"]
    monkeypatch.setattr(entries, "read", held_up)
    with pytest.raises(LogMovedError, match="the log of tiny has 4 entries, and not 3"):
        ledger.append("purge", why="decided by three", details=PURGED, after=3)
    assert len(ledger.log()) == 4


def test_what_was_decided_by_an_older_log_is_not_appended(ledger, three):
    for after in (0, 2, 4):
        with pytest.raises(LogMovedError, match=f"has 3 entries, and not {after}"):
            ledger.append("purge", details=PURGED, after=after)
    assert ledger.log() == three
    assert ledger.append("purge", details=PURGED, after=3).number == 4


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("UPDATE entries SET document = replace(document, 'first', 'later') WHERE number = 1", "log entry 1: must be"),
        ("UPDATE entries SET document = substr(document, 1, 20) WHERE number = 1", "log entry 1: must be"),
        ("UPDATE entries SET document = document || ' ' WHERE number = 3", "log entry 3: must be"),
        ("UPDATE entries SET digest = '0' WHERE number = 3", "log entry 3: must be"),
        ("DELETE FROM entries WHERE number = 2", "log entry 2: is missing"),
        ("UPDATE entries SET number = 1000000000 WHERE number = 3", "log entry 3: is missing"),
        ("UPDATE entries SET number = 9 - number; UPDATE entries SET number = number - 5", "log entry 1: says"),
    ],
)
def test_whoever_alters_what_is_stored_is_seen(ledger, uri, three, change, told):
    assert ledger.log() == three  # was valid before, in this process
    run_sql(uri, *change.split("; "))
    for reader in (ledger, Ledger(uri, "tiny")):
        with pytest.raises(LineageError, match=f"the log of tiny: {told}"):
            reader.log()
        with pytest.raises(LineageError):
            reader.append("purge", details=PURGED)
    assert chain_problems(ledger.log_as_stored())[0].startswith(told)


def test_an_entry_that_was_replaced_with_a_right_digest_breaks_the_chain(ledger, uri, three):
    forged = three[1].as_json() | {"why": "another"}
    change = "UPDATE entries SET document = :document, digest = :digest WHERE number = 2"
    run_sql(uri, change, document=canonical_json(forged).decode(), digest=fingerprint(forged))
    with pytest.raises(LineageError, match="log entry 3: does not follow the entry before it"):
        ledger.log()


def test_a_log_that_was_cut_off_or_rewritten_does_not_fit_its_anchor(ledger, uri, three):
    anchor = anchor_of(ledger.log())
    assert anchor == anchor_at(three[-1])
    assert not_anchored(ledger.log(), anchor_at(three[1])) == 1
    assert anchor_problems(ledger.log(), anchor_at(three[1])) == []
    run_sql(uri, "DELETE FROM entries WHERE number = 3")
    (problem,) = anchor_problems(ledger.log(), anchor)
    assert problem.endswith("names entry 3: it was cut off")
    ledger.append("purge", why="forged", details=PURGED)
    (problem,) = anchor_problems(ledger.log(), anchor)
    assert problem.startswith("log entry 3: is not the one")


def test_entries_are_numbered_from_one(uri, three):
    (row,) = rows(uri, "SELECT * FROM entries WHERE number = 3")
    insert = "INSERT INTO entries VALUES ('tiny', :number, :digest, :document)"
    for number in (0, 3):
        with pytest.raises(IntegrityError):
            run_sql(uri, insert, number=number, digest=row["digest"], document=row["document"])


def test_an_entry_is_json_of_its_schema(ledger, three):
    assert [parse_entry(json.loads(json.dumps(entry.as_json())), "here") for entry in three] == three
    with pytest.raises(LineageError, match="kind must be one of"):
        ledger.append("party", details=PURGED)
    assert ledger.log() == three


def test_the_settled_entry_of_an_alias_only_rises(ledger, uri):
    assert ledger.settled("champion") == 0
    for entry, settled in ((3, 3), (2, 3), (3, 3), (7, 7)):
        ledger.settle("champion", entry)
        assert ledger.settled("champion") == settled
    assert ledger.settled("challenger") == 0
    assert Ledger(uri, "another").settled("champion") == 0


def test_of_eight_that_settle_at_once_the_newest_counts(uri):
    barrier = threading.Barrier(8)

    def work(number: int) -> None:
        ledger = Ledger(uri, "tiny")
        barrier.wait()
        for turn in range(5):
            ledger.settle("champion", 8 * turn + number + 1)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert Ledger(uri, "tiny").settled("champion") == 40
