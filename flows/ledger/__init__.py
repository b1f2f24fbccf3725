"""Ledger: who may work on a lineage or move its aliases, and the log of what happened to its versions, in SQL.

SQLite for one machine, PostgreSQL for a team. `Ledger` is the way in; nothing outside this room knows its tables.
"""

from flows.ledger.claims import ALIASES, LINEAGE, Claim
from flows.ledger.errors import ClaimLostError, LedgerError, LogMovedError
from flows.ledger.ledger import Ledger

__all__ = ["ALIASES", "LINEAGE", "Claim", "ClaimLostError", "Ledger", "LedgerError", "LogMovedError"]
