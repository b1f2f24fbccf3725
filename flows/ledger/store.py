"""Short transactions on the database of a ledger.

A connection lives as long as its transaction: processes fork and threads renew claims, so none is shared.
"""

from __future__ import annotations

import functools
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Double,
    Engine,
    Table,
    cast,
    create_engine,
    extract,
    func,
    inspect,
    literal,
    select,
    text,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.pool import NullPool

from copal.files import flush
from flows.ledger.errors import LedgerError, explained
from flows.ledger.tables import METADATA, VERSION, schema
from flows.uris import without_secrets

__all__ = ["Access", "Store", "clock", "inserting"]

_BUSY = 30  # seconds to wait for others' transactions
_CREATING = 0x_C0BA1_1ED6E5  # of PostgreSQL's advisory lock: one process at a time makes the tables
# A process that is stopped within a transaction must not stop the others: the server ends its session.
_LIMITS = f"SET LOCAL lock_timeout = '{_BUSY}s'; SET LOCAL idle_in_transaction_session_timeout = '{_BUSY // 2}s'"
_BEGIN = {  # by dialect, for (reading, writing)
    "sqlite": ("BEGIN", "BEGIN IMMEDIATE"),
    "postgresql": (
        f"SET TRANSACTION ISOLATION LEVEL READ COMMITTED, READ ONLY; {_LIMITS}",
        f"SET TRANSACTION ISOLATION LEVEL READ COMMITTED; {_LIMITS}",
    ),
}
_POSTGRESQL_OPTIONS = {  # of libpq: a server that is gone is noticed; https://www.postgresql.org/docs/15/libpq-connect.html
    "application_name": "copal",
    "connect_timeout": "10",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "4",
    "tcp_user_timeout": "30000",
}


@dataclass(frozen=True, slots=True)
class Access:
    """What we may do in a database.

    Attributes:
        may_write: claims and log.
        skew: seconds that its clock is ahead of ours.
    """

    may_write: bool
    skew: float


class Store:
    """The database that a URI names; it is opened by the first transaction, and made by the first that writes."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._known = False  # whether tables of our version were seen

    @contextmanager
    def reading(self) -> Iterator[Connection | None]:
        """A transaction that only reads; None where there are no tables yet.

        Raises:
            LedgerError: the database cannot be read, or is of a newer copal.
        """
        file = self._file
        if file is not None and not file.exists():
            yield None
            return
        with self._transaction(0) as connection:
            yield connection if self._has_tables(connection) else None

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that may write; committed at the end, rolled back by any error.

        Raises:
            LedgerError: the database cannot be written, or is of a newer copal.
        """
        file = self._file
        if file is not None and not file.exists():
            self._known = False
            with explained(self.uri):
                file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                file.touch()  # an empty file is an empty database
                flush(file.parent)
        with self._transaction(1) as connection:
            if not self._has_tables(connection):
                self._create(connection)
            yield connection

    @contextmanager
    def _transaction(self, writes: int) -> Iterator[Connection]:
        with explained(self.uri), self._engine.connect() as connection, connection.begin():
            connection.exec_driver_sql(_BEGIN[connection.dialect.name][writes])
            yield connection

    def access(self) -> Access | None:
        """What we may do in the database, and how far its clock is ahead of ours; None where there are no tables yet.

        Raises:
            LedgerError: it cannot be read.
        """
        with self.reading() as connection:
            if connection is None:
                return None
            began = time.time()
            skew = (connection.scalar(select(clock(connection))) or began) - (began + time.time()) / 2
            if connection.dialect.name == "sqlite":
                return Access(may_write=self._file is not None and os.access(self._file, os.W_OK), skew=skew)
            wanted = "SELECT bool_and(has_table_privilege(name, 'INSERT, UPDATE')) FROM unnest(:names) AS name"
            names = [table.name for table in METADATA.sorted_tables if inspect(connection).has_table(table.name)]
            return Access(may_write=bool(connection.scalar(text(wanted), {"names": names})), skew=skew)

    def _has_tables(self, connection: Connection) -> bool:
        """Whether the tables are there, in our version."""
        if not self._known:
            if not inspect(connection).has_table(schema.name):
                return False
            version = connection.scalar(select(func.max(schema.c.schema_version)))
            if version != VERSION:
                raise LedgerError(
                    without_secrets(
                        f"ledger {self.uri}: its tables have version {version}, this copal knows version {VERSION}; "
                        "update copal on this machine"
                    )
                )
            self._known = True
        return True

    def make(self, connection: Connection, table: Table) -> None:
        """Make a table that ledgers of before are without, unless it is there."""
        if not inspect(connection).has_table(table.name):
            self._wait_for_makers(connection)
            table.create(connection, checkfirst=True)

    def _create(self, connection: Connection) -> None:
        self._wait_for_makers(connection)
        if self._has_tables(connection):  # another process was faster
            return
        METADATA.create_all(connection, checkfirst=False)
        connection.execute(schema.insert().values(schema_version=VERSION))

    def _wait_for_makers(self, connection: Connection) -> None:
        """One process at a time makes tables; SQLite has one writer anyway."""
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _CREATING})

    @functools.cached_property
    def _url(self) -> URL:
        wanted = "must be sqlite:////PATH or postgresql://USER@HOST/NAME"
        try:
            url = make_url(self.uri)
        except (ArgumentError, ValueError):  # of a port, say
            raise LedgerError(without_secrets(f"ledger.uri {wanted}, not {self.uri!r}")) from None
        if url.drivername == "sqlite" and url.database not in (None, "", ":memory:"):
            return url
        if url.drivername in ("postgresql", "postgresql+psycopg2"):
            return url.set(drivername="postgresql+psycopg2")
        raise LedgerError(without_secrets(f"ledger.uri {wanted}, not {self.uri!r}"))

    @property
    def _file(self) -> Path | None:
        """The file of SQLite."""
        return Path(self._url.database or "") if self._url.drivername == "sqlite" else None

    @functools.cached_property
    def _engine(self) -> Engine:
        file = self._file
        if file is not None:
            return create_engine("sqlite://", creator=functools.partial(_open_sqlite, file), poolclass=NullPool)
        options = {name: value for name, value in _POSTGRESQL_OPTIONS.items() if name not in self._url.query}
        try:
            return create_engine(self._url, connect_args=options, poolclass=NullPool)
        except ModuleNotFoundError as error:
            advice = "the driver of PostgreSQL is not installed; pip install 'copal[postgres]'"
            raise LedgerError(without_secrets(f"ledger {self.uri}: {advice}")) from error


def clock(connection: Connection) -> ColumnElement[float]:
    """Now, in seconds since the epoch: by the server's clock, or, of SQLite, by that of this machine."""
    if connection.dialect.name == "sqlite":
        return literal(time.time(), Double)
    return cast(extract("epoch", func.clock_timestamp()), Double)


def inserting(connection: Connection, table: Table) -> Any:
    """An INSERT that can say what is to happen where the row is there already (`on_conflict_do_...`)."""
    return sqlite.insert(table) if connection.dialect.name == "sqlite" else postgresql.insert(table)


def _open_sqlite(file: Path) -> sqlite3.Connection:
    # mode=rw: the file is not made by a look at it. isolation_level=None: we begin transactions, not the driver.
    connection = sqlite3.connect(f"{file.resolve().as_uri()}?mode=rw", uri=True, timeout=_BUSY, isolation_level=None)
    connection.execute("PRAGMA synchronous=EXTRA")  # what is committed outlives a power cut
    return connection
