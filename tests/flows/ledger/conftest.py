"""Ledgers on real databases: SQLite, and a PostgreSQL server where one is installed."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from ledger_support import run_sql

from flows.ledger import Ledger


class PostgresServer:
    """A PostgreSQL server of its own; everybody who reaches it is believed to be the role that he names."""

    def __init__(self, binaries: Path, folder: Path) -> None:
        self.folder = folder
        self._binaries = binaries
        self._user: str | None = None
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            self._user = "postgres"
            account = pwd.getpwnam(self._user)
            os.chown(folder, account.pw_uid, account.pw_gid)
        with contextlib.closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        data = str(self.folder / "data")
        initdb = [str(self._binaries / "initdb"), "-D", data, "-A", "trust", "-U", "copal", "--no-sync"]
        subprocess.run(initdb, check=True, capture_output=True, user=self._user, cwd=self.folder)
        command = [
            *(str(self._binaries / "postgres"), "-D", data, "-p", str(self.port), "-k", str(self.folder)),
            *("-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"),
        ]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, user=self._user, cwd=self.folder)
        pause = threading.Event()
        for _ in range(600):
            assert self._process.poll() is None, (self.folder / "log").read_text()
            with contextlib.suppress(Exception):
                return run_sql(self.uri("postgres"), "SELECT 1")
            pause.wait(0.1)
        raise AssertionError((self.folder / "log").read_text())

    def stop(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGINT)  # sessions are ended
        self._process.wait()

    def uri(self, database: str, role: str = "copal") -> str:
        return f"postgresql+psycopg2://{role}:a-secret@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        """The name of an empty database."""
        name = f"ledger_{uuid.uuid4().hex[:12]}"
        run_sql(self.uri("postgres"), f"CREATE DATABASE {name}")
        return name

    def new_role(self) -> str:
        """The name of a role that may log in, and nothing else."""
        name = f"role_{uuid.uuid4().hex[:12]}"
        run_sql(self.uri("postgres"), f"CREATE ROLE {name} LOGIN")
        return name


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgresServer]:
    """One PostgreSQL server for the whole run."""
    pytest.importorskip("psycopg2", reason="the driver of PostgreSQL is not installed: pip install 'copal[postgres]'")
    found = shutil.which("initdb") or next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))), None)
    if found is None:
        pytest.skip("PostgreSQL is not installed; on Debian and Ubuntu: apt-get install postgresql")
    folder = Path(tempfile.mkdtemp(prefix="copal-postgresql-"))  # pytest's own folders are closed to other users
    server = PostgresServer(Path(found).resolve().parent, folder)
    try:
        server.start()
        yield server
        server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of a ledger that is not there yet, on either database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'ledger.db'}"
    server: PostgresServer = request.getfixturevalue("postgresql")
    return server.uri(server.new_database())


@pytest.fixture
def ledger(uri: str) -> Ledger:
    return Ledger(uri, "tiny")
