"""Ledger: who may work on a lineage or move its aliases, the log of what happened to its versions, and which data was
refused, in SQL.

SQLite for one machine, PostgreSQL for a team. `Ledger` is the way in; nothing outside this room knows its tables.
"""

from flows.ledger.claims import ALIASES, LINEAGE, Claim
from flows.ledger.errors import ClaimLostError, LedgerError, LogMovedError
from flows.ledger.ledger import Ledger
from flows.ledger.refusals import Refusal

__all__ = ["ALIASES", "LINEAGE", "Claim", "ClaimLostError", "Ledger", "LedgerError", "LogMovedError", "Refusal"]
