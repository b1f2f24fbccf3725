"""The rows of the log: one for each entry, numbered from 1 without gaps; rows are only added."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import Connection, Row, func, select

from copal.bounded import parse_json
from copal.config import canonical_json, fingerprint
from flows.ledger.store import Store, inserting
from flows.ledger.tables import entries
from flows.lineage.entries import Entry
from flows.lineage.fields import LineageError

__all__ = ["add", "read"]

_GAP = 1000  # so many missing entries in a row are shown at most


def read(connection: Connection, lineage: str) -> list[Any]:
    """The log as it is stored; see `flows.ledger.Ledger.log_as_stored`."""
    columns = entries.c.number, entries.c.digest, entries.c.document
    query = select(*columns).where(entries.c.lineage == lineage).order_by(entries.c.number)
    found: list[Any] = []
    wanted = 1
    for row in connection.execute(query):
        found += [None] * min(row.number - wanted, _GAP)
        found.append(_value(row))
        wanted = row.number + 1
    return found


def add(store: Store, lineage: str, follow: Callable[[Sequence[Any], str | None], Entry]) -> Entry:
    """Append the entry that `follow` makes of the log and of the role that the database knows this process by.

    It is called again where another process got the number.
    """
    while True:
        with store.writing() as connection:
            entry = follow(read(connection, lineage), _role(connection))
            row = {
                "lineage": lineage,
                "number": entry.number,
                "digest": entry.digest,
                "document": canonical_json(entry.as_json()).decode(),
            }
            added = connection.execute(inserting(connection, entries).values(row).on_conflict_do_nothing())
            if added.rowcount == 1:
                break
    return entry


def _role(connection: Connection) -> str | None:
    """Of whoever logged in to the server, whatever role was set since; SQLite knows none."""
    if connection.dialect.name == "sqlite":
        return None
    return str(connection.scalar(select(func.session_user())))


def _value(row: Row[Any]) -> Any:
    """The entry; what is not as it was written comes as text, for whoever checks it."""
    try:
        value = parse_json(row.document, "the entry", LineageError)
        if canonical_json(value).decode() == row.document and fingerprint(value) == row.digest:
            return value
    except (LineageError, ValueError):
        pass
    return row.document
