"""The database under the ledger: when it is made, who may do what, and one line on what is wrong with it."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from flows.ledger import ALIASES, LINEAGE, Ledger, LedgerError
from support.ledgers import CONTEXT, PURGED, queries, rows, run_sql, start, without_rights


def refused(do) -> str:
    """The one line of a `LedgerError`, without a password."""
    with pytest.raises(LedgerError) as caught:
        do()
    line = str(caught.value)
    assert "\n" not in line
    assert "a-secret" not in line
    return line


def read(ledger: Ledger) -> None:
    assert (ledger.log(), ledger.log_as_stored(), ledger.settled("champion")) == ([], [], 0)


def write(ledger: Ledger) -> None:
    ledger.append("purge", details=PURGED)


def hold(ledger: Ledger) -> None:
    with ledger.hold(LINEAGE, "work", lease=60):
        pass


def test_reading_makes_nothing(uri, tmp_path):
    read(Ledger(uri, "tiny"))
    assert list(tmp_path.iterdir()) == []
    if uri.startswith("postgresql"):
        assert rows(uri, "SELECT * FROM pg_tables WHERE schemaname = 'public'") == []


def test_a_folder_that_is_missing_is_made_by_the_first_who_writes(tmp_path):
    path = tmp_path / "a folder?%20#" / "deeper" / "ledger.db"
    ledger = Ledger(f"sqlite:///{str(path).replace('?', '%3F').replace('#', '%23')}", "tiny")
    assert "%3F" in ledger.uri
    ledger = Ledger(f"sqlite:///{tmp_path / 'a folder %20#' / 'ledger.db'}", "tiny")
    read(ledger)
    write(ledger)
    assert [path.name for path in tmp_path.iterdir()] == ["a folder %20#"]
    assert len(ledger.log()) == 1


def test_a_database_that_was_taken_away_is_empty_again(tmp_path):
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}", "tiny")
    write(ledger)
    (tmp_path / "ledger.db").unlink()
    read(ledger)
    write(ledger)
    assert len(ledger.log()) == 1


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "ledger.db",
        "sqlite://",
        "sqlite:///:memory:",
        "mysql://ada:a-secret@host/x",
        "postgresql://h:port/x",
        "http://h",
    ],
)
def test_what_is_no_ledger_is_refused_at_the_first_call(uri):
    ledger = Ledger(uri, "tiny")
    for do in (read, write, hold):
        line = refused(lambda do=do: do(ledger))
        assert line.startswith("ledger.uri must be sqlite:////PATH or postgresql://USER@HOST/NAME, not '")


def test_tables_of_a_newer_copal_are_refused(ledger, uri):
    write(ledger)
    run_sql(uri, "UPDATE ledger SET schema_version = 2")
    for do in (read, write, hold):
        line = refused(lambda do=do: do(Ledger(uri, "tiny")))
        assert line.endswith("its tables have version 2, this copal knows version 1; update copal on this machine")


def test_a_broken_file_is_refused(tmp_path):
    path = tmp_path / "ledger.db"
    path.write_bytes(b"no database" * 1000)
    for do in (read, write, hold):
        line = refused(lambda do=do: do(Ledger(f"sqlite:///{path}", "tiny")))
        assert line == (
            f"ledger sqlite:///{path}: file is not a database; "
            "bring back a copy of the file, or name another one in ledger.uri"
        )
    assert path.read_bytes() == b"no database" * 1000


def test_a_folder_in_place_of_the_file_is_refused(tmp_path):
    for do in (read, write):
        assert "unable to open database file; see that" in refused(
            lambda do=do: do(Ledger(f"sqlite:///{tmp_path}", "t"))
        )


def test_a_place_where_no_folder_can_be_is_refused(tmp_path):
    (tmp_path / "file").touch()
    ledger = Ledger(f"sqlite:///{tmp_path / 'file' / 'ledger.db'}", "tiny")
    read(ledger)
    assert "see that the folder is there" in refused(lambda: write(ledger))


def test_who_may_only_read_a_file_reads_and_writes_nothing():
    with tempfile.TemporaryDirectory(prefix="copal-") as folder:  # pytest's own folders are closed to other users
        path = Path(folder) / "ledger.db"
        Ledger(f"sqlite:///{path}", "tiny").append("purge", details=PURGED)
        said = CONTEXT.Queue()
        if os.geteuid() != 0:
            path.chmod(0o444)
        Path(folder).chmod(0o755)
        child = start(without_rights, str(path), said)
        assert said.get(timeout=60) == 1
        line = said.get(timeout=60)
        child.join()
    assert line == (
        f"ledger sqlite:///{path}: attempt to write a readonly database; "
        "let this user write to the file and to its folder"
    )


def test_a_server_that_is_not_there_is_told_in_one_line():
    pytest.importorskip("psycopg2")
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ledger = Ledger(f"postgresql://ada:a-secret@127.0.0.1:{port}/ledger?password=a-secret", "tiny")
    for do in (read, write, hold):
        line = refused(lambda do=do: do(ledger))
        assert line.startswith(f"ledger postgresql://ada@127.0.0.1:{port}/ledger?password=... connection to server")
        assert line.endswith("Connection refused; start the server, or correct ledger.uri")


def test_a_missing_driver_is_told_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    line = refused(lambda: read(Ledger("postgresql://ada:a-secret@127.0.0.1/ledger", "tiny")))
    assert line.endswith("the driver of PostgreSQL is not installed; pip install 'copal[postgres]'")


def test_both_names_of_postgresql_are_one(postgresql):
    long = postgresql.uri(postgresql.new_database())
    write(Ledger(long.replace("+psycopg2", ""), "tiny"))
    assert len(Ledger(long, "tiny").log()) == 1


def test_a_reader_reads_and_can_block_nobody(postgresql):
    database, role = postgresql.new_database(), postgresql.new_role()
    ledger = Ledger(postgresql.uri(database), "tiny")
    write(ledger)
    reader = Ledger(postgresql.uri(database, role), "tiny")
    assert "permission denied for table" in refused(reader.log)
    run_sql(ledger.uri, f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}")
    assert reader.log() == ledger.log()
    for do in (write, hold, lambda ledger: ledger.settle("champion", 1)):
        line = refused(lambda do=do: do(reader))
        assert "permission denied for table" in line
        assert line.endswith(
            "; ask the owner of the database to let this role use the tables of the ledger, or to make them"
        )
    hold(ledger)
    assert len(ledger.log()) == 1


def test_a_role_needs_no_more_than_its_rights_on_the_tables(postgresql):
    database, role = postgresql.new_database(), postgresql.new_role()
    owner, worker = Ledger(postgresql.uri(database), "tiny"), Ledger(postgresql.uri(database, role), "tiny")
    read(worker)
    assert "permission denied for schema public" in refused(lambda: write(worker))
    write(owner)
    run_sql(
        owner.uri,
        f"GRANT SELECT ON ledger TO {role}",
        f"GRANT SELECT, INSERT ON entries TO {role}",
        f"GRANT SELECT, INSERT, UPDATE ON claims, settled TO {role}",
    )
    for _ in range(2):
        with worker.hold(LINEAGE, "work", lease=60) as claim, worker.hold(ALIASES, "a move", lease=60):
            claim.seal("m-1")
            claim.unseal()
        worker.append("purge", details=PURGED)
        worker.settle("champion", 1)
    assert len(worker.log()) == 3


def test_a_server_that_takes_no_writes_is_told_in_one_line(postgresql):
    database = postgresql.new_database()
    ledger = Ledger(postgresql.uri(database), "tiny")
    write(ledger)
    run_sql(postgresql.uri("postgres"), f"ALTER DATABASE {database} SET default_transaction_read_only = on")
    assert len(ledger.log()) == 1
    line = refused(lambda: write(ledger))
    assert "read-only transaction; name the server that takes writes in ledger.uri" in line


def test_a_ledger_works_on_in_a_forked_process(ledger, uri):
    write(ledger)
    child = os.fork()  # nothing of multiprocessing, which in the child ends what other tests have begun in this process
    if child == 0:
        code = 1
        try:
            write(ledger)
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    write(ledger)
    assert len(ledger.log()) == 3


def test_each_call_is_a_few_statements(ledger):
    """Each is a request to a server that may be far away; the first statement begins the transaction."""
    write(ledger)
    pause = threading.Event()

    def held() -> None:
        with ledger.hold(LINEAGE, "work", lease=3600) as claim:
            claim.check()
            claim.seal("m-1")
            claim.unseal()
            pause.wait(0.01)

    held()
    role = 1 if ledger.uri.startswith("postgresql") else 0
    assert len(queries(ledger.log)) == 2
    assert len(queries(lambda: ledger.settled("champion"))) == 2
    assert len(queries(lambda: ledger.settle("champion", 1))) == 2
    assert len(queries(lambda: write(ledger))) == 3 + role
    assert len(queries(held)) == 2 * 5  # looked at, taken, sealed, unsealed, freed
