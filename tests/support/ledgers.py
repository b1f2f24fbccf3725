"""What the tests of the ledger run in processes of their own, and looks past the ledger into its database."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from typing import Any

from sqlalchemy import create_engine, event, text, update
from sqlalchemy.pool import NullPool

from copal.errors import CopalError
from flows.ledger import LINEAGE, Ledger, LedgerError
from flows.ledger.store import Store
from flows.ledger.tables import claims
from flows.lineage.entries import PurgeDetails

PURGED = PurgeDetails(domain="code", dvc_md5="a" * 32, deleted=(2,), traces=(2, 3))
CONTEXT = multiprocessing.get_context("spawn")


def run_sql(uri: str, *statements: str, **values: Any) -> None:
    """Run statements as anybody with access to the database could."""
    engine = create_engine(uri, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for statement in statements:
            connection.execute(text(statement), values)


def rows(uri: str, query: str) -> list[dict[str, Any]]:
    """What a query finds."""
    with create_engine(uri, poolclass=NullPool).connect() as connection:
        return [dict(row) for row in connection.execute(text(query)).mappings()]


def claim_row(uri: str) -> dict[str, Any]:
    (row,) = rows(uri, "SELECT * FROM claims WHERE kind = 'lineage'")
    return row


def expire(uri: str) -> None:
    """Every claim is past its expiry."""
    run_sql(uri, "UPDATE claims SET expires = 0")


def queries(do: Callable[[], Any]) -> list[str]:
    """The statements that are sent while `do` runs."""
    from sqlalchemy import Engine

    sent: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        sent.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    try:
        do()
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    return sent


def start(target: Callable[..., None], *arguments: Any) -> Any:
    made = CONTEXT.Process(target=target, args=arguments, daemon=True)
    made.start()
    return made


def together(target: Callable[..., None], count: int, *arguments: Any) -> None:
    """Call target(number, barrier, *arguments) in `count` processes; all must end well."""
    barrier = CONTEXT.Barrier(count)
    children = [start(target, number, barrier, *arguments) for number in range(count)]
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * count


def hold_and_append(number: int, barrier: Any, uri: str, rounds: int, inside: Any, most: Any, tokens: Any) -> None:
    """Hold the lineage again and again, and append to its log with and without holding it.

    Args:
        inside: how many hold it now; most: how many did at once; tokens: of all claims in the order of their time, the
            first item counts them.
    """
    ledger = Ledger(uri, "raced")
    barrier.wait()
    for turn in range(rounds):
        with ledger.hold(LINEAGE, f"worker {number}", lease=60) as claim:
            with inside.get_lock():
                inside.value += 1
                most.value = max(most.value, inside.value)
            claim.seal(f"m-{number}-{turn}")
            claim.unseal()
            tokens[0] += 1
            tokens[tokens[0]] = claim.token
            with inside.get_lock():
                inside.value -= 1
        ledger.append("purge", why=f"{number}/{turn}", details=PURGED)


def append_at_once(number: int, barrier: Any, uri: str, turns: int) -> None:
    """The first who write also make the database."""
    ledger = Ledger(uri, "raced")
    barrier.wait()
    for turn in range(turns):
        ledger.append("purge", why=f"{number}/{turn}", details=PURGED)


def take_and_die(uri: str, sealed: str) -> None:
    with Ledger(uri, "tiny").hold(LINEAGE, "dies", lease=3600) as claim:
        claim.seal(sealed)
        os.kill(os.getpid(), signal.SIGKILL)


def stop_then_seal(uri: str, lease: float, said: Any) -> None:
    """Take the lineage, stop, and seal once somebody lets the process go on; says what came of it."""
    try:
        with Ledger(uri, "tiny").hold(LINEAGE, "late", lease=lease) as claim:
            os.kill(os.getpid(), signal.SIGSTOP)
            claim.seal("m-late")
            said.put("sealed")
    except CopalError as error:
        said.put(type(error).__name__)


def stop_within_a_transaction(uri: str, said: Any) -> None:
    """Stop with a row of the claims locked."""
    try:
        with Store(uri).writing() as connection:
            connection.execute(update(claims).values(what="stopped"))
            os.kill(os.getpid(), signal.SIGSTOP)
        said.put("committed")
    except LedgerError as error:
        said.put(str(error))


def die_within_a_transaction(uri: str) -> None:
    with Store(uri).writing() as connection:
        connection.execute(update(claims).values(token=99))
        os.kill(os.getpid(), signal.SIGKILL)


def without_rights(path: str, said: Any) -> None:
    """Read and write a SQLite ledger as a user who may only read it."""
    ledger = Ledger(f"sqlite:///{path}", "tiny")
    ledger.log()  # so that everything is imported
    if os.geteuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    said.put(len(ledger.log()))
    try:
        ledger.append("purge", details=PURGED)
    except LedgerError as error:
        said.put(str(error))
