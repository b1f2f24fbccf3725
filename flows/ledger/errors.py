"""The errors of the ledger; and one line on what an error of its database means and what to do."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from copal.errors import CopalError, first_line
from flows.uris import cause, without_secrets

__all__ = ["ClaimLostError", "LedgerError", "LogMovedError", "explained"]

_SQLITE = {  # a word of SQLite's message, and what to do
    "locked": "another process keeps it locked; end that one, or try again",
    "readonly": "let this user write to the file and to its folder",
    "read-only": "let this user write to the file and to its folder",
    "unable to open": "see that the folder is there and that this user may read and write it",
    "disk is full": "make room on the disk",
}
_POSTGRESQL = {  # an error code, or its first two characters, and what to do; https://www.postgresql.org/docs/15/errcodes-appendix.html
    "42501": "ask the owner of the database to let this role use the tables of the ledger, or to make them",
    "25006": "name the server that takes writes in ledger.uri",
    "55P03": "another session keeps the tables locked; end that one, or try again",
    "25P03": "this process was held up in a transaction; try again",
    "53": "the server is short of connections, memory or disk; make room, or try again",
    "57": "the server was shut down or is starting; try again once it runs",
    "": "start the server, or correct ledger.uri",
}


class LedgerError(CopalError):
    """The ledger cannot be opened, read or written."""


class LogMovedError(LedgerError):
    """Somebody appended to the log since it was looked at."""


class ClaimLostError(CopalError):
    """Another process took the lineage over, or may have: what is finished stays staged."""


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """Make what a database raises a `LedgerError`.

    Args:
        uri: of the ledger, for the message; passwords are left out.
    """
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error, OSError) as error:
        raise LedgerError(without_secrets(f"ledger {uri}: {_explanation(error)}")) from cause(error)


def _explanation(error: Exception) -> str:
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    reason = first_line(cause)
    if isinstance(cause, OSError):
        return f"{reason}; see that the folder is there and that this user may write to it"
    if isinstance(cause, sqlite3.Error):
        advice = next((advice for word, advice in _SQLITE.items() if word in reason), None)
        return f"{reason}; {advice or 'bring back a copy of the file, or name another one in ledger.uri'}"
    if isinstance(error, DBAPIError):
        if error.connection_invalidated:
            return f"{reason}; the connection was lost, try again"
        code = str(getattr(cause, "pgcode", None) or "")
        advice = _POSTGRESQL.get(code) or _POSTGRESQL.get(code[:2])
        return f"{reason}; {advice or 'look into the log of the server'}"
    return f"{reason}; correct ledger.uri"
