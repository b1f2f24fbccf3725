"""One holder of a lineage at a time, whoever races for it, and nothing from one that came too late."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from flows.ledger import ALIASES, LINEAGE, ClaimLostError, Ledger, LedgerError, claims
from support.ledgers import (
    CONTEXT,
    claim_row,
    die_within_a_transaction,
    expire,
    hold_and_append,
    run_sql,
    start,
    stop_then_seal,
    stop_within_a_transaction,
    take_and_die,
    together,
)


def test_of_eight_threads_one_after_another_holds_the_lineage(uri):
    """40 times the lineage is taken; tokens rise, and never do two hold it at once."""
    at_once, tokens, lock = [0, 0], [], threading.Lock()
    barrier = threading.Barrier(8)

    def work(number: int) -> None:
        ledger = Ledger(uri, "raced")
        barrier.wait()
        for _ in range(5):
            with ledger.hold(LINEAGE, f"worker {number}", lease=30) as claim:
                with lock:
                    at_once[0] += 1
                    at_once[1] = max(at_once)
                    tokens.append(claim.token)
                claim.check()
                with lock:
                    at_once[0] -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert at_once == [0, 1]
    assert tokens == list(range(1, 41))


def race(uri: str, rounds: int) -> None:
    """Eight processes hold the lineage `rounds` times each, seal, unseal and append to the log."""
    inside, most = CONTEXT.Value("i", 0), CONTEXT.Value("i", 0)
    tokens = CONTEXT.Array("q", 8 * rounds + 1, lock=False)
    together(hold_and_append, 8, uri, rounds, inside, most, tokens)
    assert (inside.value, most.value, tokens[0]) == (0, 1, 8 * rounds)
    assert list(tokens[1:]) == list(range(2, 16 * rounds + 1, 2))  # each claim was taken, then sealed
    log = Ledger(uri, "raced").log()
    assert [entry.number for entry in log] == list(range(1, 8 * rounds + 1))
    assert {entry.why for entry in log} == {f"{number}/{turn}" for number in range(8) for turn in range(rounds)}


def test_of_eight_processes_one_after_another_holds_the_lineage(uri):
    race(uri, 5)


@pytest.mark.team
@pytest.mark.parametrize("rounds", [50, pytest.param(200, marks=pytest.mark.soak)])
def test_eight_processes_race_on_postgresql(postgresql, rounds):
    race(postgresql.uri(postgresql.new_database()), rounds)


def test_of_eight_that_saw_the_same_claim_one_takes_it(ledger, uri):
    """The race itself: the token that was seen is in the database once."""
    with ledger.hold(LINEAGE, "first", lease=30):
        pass
    barrier = threading.Barrier(8)

    def take(number: int) -> list[bool]:
        place = claims.Place(store=Ledger(uri, "tiny")._store, lineage="tiny", kind=LINEAGE)
        won = []
        for _ in range(10):
            seen = claims.look(place)
            barrier.wait()
            won.append(claims.take(place, seen, f"worker {number}", lease=0.0))
            barrier.wait()
        return won

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(take, range(8)))
    assert [sum(of_one) for of_one in zip(*won, strict=True)] == [1] * 10
    assert claim_row(uri)["token"] == 11


def test_a_claim_past_its_expiry_is_taken_over_and_its_late_holder_notices(ledger, uri):
    with contextlib.suppress(ClaimLostError), ledger.hold(LINEAGE, "late", lease=60) as late:
        expire(uri)
        with ledger.hold(LINEAGE, "next", lease=60) as following:
            assert following.token == late.token + 1
            with pytest.raises(ClaimLostError, match="nothing was published"):
                late.seal("m-late")
            following.seal("m-next")
        with pytest.raises(ClaimLostError):
            late.check()
    assert claim_row(uri)["sealed"] == "m-next"


@pytest.mark.parametrize("do", [lambda claim: claim.renew(), lambda claim: claim.seal("m-2")], ids=["renew", "seal"])
def test_a_claim_past_its_expiry_does_not_come_back(ledger, uri, do):
    with contextlib.suppress(ClaimLostError), ledger.hold(LINEAGE, "late", lease=60) as claim:
        expire(uri)
        with pytest.raises(ClaimLostError):
            do(claim)


def test_a_holder_that_was_taken_over_frees_and_unseals_nothing(ledger, uri):
    def work() -> None:
        with ledger.hold(LINEAGE, "late", lease=60) as late:
            late.seal("m-late")
            expire(uri)
            with ledger.hold(LINEAGE, "next", lease=60) as following:
                assert following.inherited == "m-late"
                with pytest.raises(ClaimLostError, match="whoever took over publishes what was sealed"):
                    late.unseal()
                late.end()
                following.check()
                row = claim_row(uri)
                assert (row["held"], row["token"], row["sealed"]) == (True, following.token, "m-late")
                following.renew()
            late.check()

    with pytest.raises(ClaimLostError):
        work()


def test_a_holder_whose_process_is_dead_is_not_waited_for(ledger, uri):
    child = start(take_and_die, uri, "m-dead")
    child.join()
    assert child.exitcode == -signal.SIGKILL
    row = claim_row(uri)
    assert (row["held"], row["pid"], row["token"]) == (True, child.pid, 2)
    with ledger.hold(LINEAGE, "next", lease=60, tell=pytest.fail) as claim:
        assert (claim.token, claim.inherited) == (3, "m-dead")


def test_a_holder_on_another_machine_is_waited_for_until_its_claim_expires(ledger, uri):
    child = start(take_and_die, uri, "m-dead")
    child.join()
    run_sql(uri, "UPDATE claims SET machine = 'another', host = 'far'")
    said = []

    def tell(line: str) -> None:
        said.append(line)
        expire(uri)

    with ledger.hold(LINEAGE, "next", lease=60, tell=tell):
        assert said == [f"waiting for process {child.pid} on far (dies), which works on tiny"]


def test_a_claim_outlives_its_expiry_as_long_as_its_holder_lives(ledger, uri):
    with ledger.hold(LINEAGE, "long", lease=2) as claim:
        first = claim_row(uri)["expires"]
        pause = threading.Event()
        while claim_row(uri)["expires"] <= first + 2:
            pause.wait(0.05)
        claim.check()


def test_a_worker_that_was_stopped_past_its_expiry_seals_nothing(ledger, uri):
    said = CONTEXT.Queue()
    late = start(stop_then_seal, uri, 1.5, said)
    pause = threading.Event()
    while psutil.Process(late.pid).status() != psutil.STATUS_STOPPED:
        pause.wait(0.05)
    with ledger.hold(LINEAGE, "next", lease=60) as following:
        os.kill(late.pid, signal.SIGCONT)
        late.join()
        assert said.get(timeout=60) == "ClaimLostError"
        following.seal("m-next")
        assert claim_row(uri)["sealed"] == "m-next"


@pytest.mark.team
def test_a_process_that_is_stopped_within_a_transaction_does_not_stop_the_others(postgresql):
    uri = postgresql.uri(postgresql.new_database())
    ledger = Ledger(uri, "tiny")
    with ledger.hold(LINEAGE, "first", lease=60):
        pass
    said = CONTEXT.Queue()
    stopped = start(stop_within_a_transaction, uri, said)
    pause = threading.Event()
    while psutil.Process(stopped.pid).status() != psutil.STATUS_STOPPED:
        pause.wait(0.05)
    with ledger.hold(LINEAGE, "next", lease=60):
        os.kill(stopped.pid, signal.SIGCONT)
        line = said.get(timeout=60)
        assert line.startswith("ledger postgresql")
        assert line.endswith("try again")
        assert claim_row(uri)["what"] == "next"


def test_what_a_process_was_killed_in_did_not_happen(ledger, uri):
    with ledger.hold(LINEAGE, "first", lease=60):
        pass
    child = start(die_within_a_transaction, uri)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert claim_row(uri)["token"] == 1
    with ledger.hold(LINEAGE, "next", lease=60) as claim:
        assert claim.token == 2


def test_a_claim_holds_while_the_ledger_does_not_answer_until_its_lease_is_over(tmp_path):
    path = tmp_path / "ledger.db"
    ledger = Ledger(f"sqlite:///{path}", "tiny")

    def work() -> None:
        with ledger.hold(LINEAGE, "work", lease=3) as claim:
            content = path.read_bytes()
            path.write_bytes(b"no database" * 100)
            with pytest.raises(LedgerError):
                claim.renew()
            claim.check()
            pause = threading.Event()
            with contextlib.suppress(ClaimLostError):
                while True:
                    claim.check()
                    pause.wait(0.05)
            path.write_bytes(content)
            raise ValueError("what the loss led to")

    with pytest.raises(ClaimLostError):
        work()


def test_an_error_stays_what_it_is_while_the_claim_holds(ledger, uri):
    for error in (ValueError("a bug"), LedgerError("gone"), KeyboardInterrupt()):
        with pytest.raises(type(error)), ledger.hold(LINEAGE, "work", lease=60):
            raise error
        assert not claim_row(uri)["held"]


def test_what_is_sealed_is_inherited_until_somebody_unseals_it(ledger):
    with ledger.hold(LINEAGE, "first", lease=60) as claim:
        assert claim.inherited == ""
        claim.seal("m-1")
    for _ in range(2):
        with ledger.hold(LINEAGE, "next", lease=60) as claim:
            assert claim.inherited == "m-1"
    with pytest.raises(AssertionError), ledger.hold(LINEAGE, "forgets it", lease=60) as claim:
        claim.seal("m-2")
    with ledger.hold(LINEAGE, "sees to it", lease=60) as claim:
        assert claim.inherited == "m-1"
        claim.unseal()
        claim.seal("m-2")
        claim.unseal()
    with ledger.hold(LINEAGE, "last", lease=60) as claim:
        assert claim.inherited == ""


def test_claims_of_other_kinds_and_lineages_are_not_waited_for(ledger, uri):
    with (
        ledger.hold(LINEAGE, "a long step", lease=60),
        ledger.hold(ALIASES, "a rollback", lease=60, tell=pytest.fail),
        Ledger(uri, "another").hold(LINEAGE, "a step", lease=60, tell=pytest.fail) as claim,
    ):
        assert claim.token == 1


def test_a_ledger_that_is_busy_does_not_keep_a_run_from_ending(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "_END_WAIT", 0.1)
    path = tmp_path / "ledger.db"
    ledger = Ledger(f"sqlite:///{path}", "tiny")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        with ledger.hold(LINEAGE, "work", lease=60):
            other.execute("BEGIN IMMEDIATE")
        assert claim_row(ledger.uri)["held"]
        other.execute("ROLLBACK")
    pause = threading.Event()
    while claim_row(ledger.uri)["held"]:  # the thread comes through in the end
        pause.wait(0.05)


def test_guarded_work_ends_at_its_next_sign_of_progress(ledger, uri):
    seen = []

    def work() -> None:
        with ledger.hold(LINEAGE, "late", lease=60) as claim:
            progress = claim.guard(lambda *step: seen.append(step))
            progress("prune", 1, 3)
            expire(uri)
            with contextlib.suppress(ClaimLostError):
                claim.renew()
            progress("prune", 2, 3)

    with pytest.raises(ClaimLostError):
        work()
    assert seen == [("prune", 1, 3)]
