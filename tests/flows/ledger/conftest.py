"""Ledgers on real databases: SQLite, and a PostgreSQL server where one is installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.ledger import Ledger
from support.servers import PostgresServer


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.team)])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of a ledger that is not there yet, on either database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'ledger.db'}"
    server: PostgresServer = request.getfixturevalue("postgresql")
    return server.uri(server.new_database())


@pytest.fixture
def ledger(uri: str) -> Ledger:
    return Ledger(uri, "tiny")
