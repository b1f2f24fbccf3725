"""The tables of the ledger. A change of them raises `VERSION`, unless a copal that does not know it can do without."""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, CheckConstraint, Column, Double, Integer, MetaData, Table, Text

__all__ = ["METADATA", "VERSION", "claims", "entries", "refusals", "schema", "settled"]

VERSION = 1

METADATA = MetaData()

# One row: which version of the tables these are.
schema = Table("ledger", METADATA, Column("schema_version", Integer, primary_key=True, autoincrement=False))

# One row a lineage and kind of claim, never deleted: who holds it now, or held it last.
claims = Table(
    "claims",
    METADATA,
    Column("lineage", Text, primary_key=True),
    Column("kind", Text, primary_key=True),
    Column("token", BigInteger, nullable=False),  # the fencing token: only rises
    Column("held", Boolean, nullable=False),
    Column("expires", Double, nullable=False),  # seconds since the epoch, by the clock of the database
    Column("sealed", Text, nullable=False),  # id of the artifacts that are about to be published; "" for none
    Column("what", Text, nullable=False),  # the holder's work, for people
    Column("host", Text, nullable=False),  # its name, for people
    Column("machine", Text, nullable=False),  # whose process numbers `pid` is one of
    Column("pid", BigInteger, nullable=False),
    Column("started", Double, nullable=False),  # seconds since the epoch, by the clock of the machine
)

# The log: rows are only added.
entries = Table(
    "entries",
    METADATA,
    Column("lineage", Text, primary_key=True),
    Column("number", BigInteger, CheckConstraint("number >= 1"), primary_key=True, autoincrement=False),
    Column("digest", Text, nullable=False),  # SHA-256 of the document
    Column("document", Text, nullable=False),  # the entry as canonical JSON
)

# The newest log entry whose move of an alias was made in the registry.
settled = Table(
    "settled",
    METADATA,
    Column("lineage", Text, primary_key=True),
    Column("alias", Text, primary_key=True),
    Column("entry", BigInteger, nullable=False),
)

# Why the data of a domain was refused last. Younger than the others: a ledger may be without it.
refusals = Table(
    "refusals",
    METADATA,
    Column("lineage", Text, primary_key=True),
    Column("domain", Text, primary_key=True),
    Column("dvc_md5", Text, nullable=False),
    Column("settings", Text, nullable=False),  # fingerprint of the settings that refused it
    Column("reason", Text, nullable=False),
    Column("since", Double, nullable=False),  # seconds since the epoch, by the clock of the database
)
