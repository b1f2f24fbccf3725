"""infra/compose/databases.sh on a real PostgreSQL: a database and a role for each part, twice."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from support.servers import PostgresServer

SCRIPT = Path(__file__).parents[3] / "infra" / "compose" / "databases.sh"
DATABASES = ("mlflow", "mlflow_auth", "prefect", "ledger")


@pytest.fixture(scope="module")
def secrets(postgresql: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The passwords that the databases were made with, the second time."""
    if shutil.which("psql") is None:
        pytest.skip("psql is not installed; on Debian and Ubuntu: apt-get install postgresql-client")
    folder = tmp_path_factory.mktemp("secrets")
    for turn in ("first", "second"):
        for name in (*DATABASES, "ledger_reader"):
            (folder / f"{name}_db_password").write_text(f"{turn} '{name}'\n")
        place = {"PGHOST": "127.0.0.1", "PGPORT": str(postgresql.port), "PGUSER": "copal", "SECRETS": str(folder)}
        subprocess.run(["sh", str(SCRIPT)], env={"PATH": os.environ["PATH"], **place}, check=True)
    return folder


def sql(server: PostgresServer, database: str, role: str, statement: str) -> list[tuple]:
    import psycopg2

    address = server.uri(database, role).replace("+psycopg2", "")
    with psycopg2.connect(address) as connection, connection.cursor() as cursor:
        cursor.execute(statement)
        return cursor.fetchall() if cursor.description else []


def test_each_part_has_a_database_that_is_its_own(postgresql, secrets) -> None:
    asked = f"SELECT datname, pg_get_userbyid(datdba) FROM pg_database WHERE datname IN {DATABASES}"
    owners = dict(sql(postgresql, "postgres", "copal", asked))
    assert owners == {name: name for name in DATABASES}
    for name in DATABASES:
        sql(postgresql, name, name, "CREATE TABLE IF NOT EXISTS a_table (a int)")
        for other in set(DATABASES) - {name}:
            with pytest.raises(Exception, match="permission denied for database"):
                sql(postgresql, other, name, "SELECT 1")


def test_a_second_time_sets_the_passwords_and_each_has_one(postgresql, secrets) -> None:
    found = dict(sql(postgresql, "postgres", "copal", "SELECT rolname, rolpassword FROM pg_authid WHERE rolcanlogin"))
    made = [found[name] for name in (*DATABASES, "ledger_reader")]
    assert all(each.startswith("SCRAM-SHA-256$") for each in made)
    assert len(set(made)) == len(made)


def test_who_may_read_the_ledger_may_not_write_it(postgresql, secrets) -> None:
    sql(postgresql, "ledger", "ledger", "CREATE TABLE IF NOT EXISTS later (a int)")
    sql(postgresql, "ledger", "ledger", "INSERT INTO later VALUES (1)")
    assert sql(postgresql, "ledger", "ledger_reader", "SELECT * FROM later") == [(1,)]
    for statement in ("INSERT INTO later VALUES (2)", "DROP TABLE later", "CREATE TABLE mine (a int)"):
        with pytest.raises(Exception, match=r"permission denied|must be owner"):
            sql(postgresql, "ledger", "ledger_reader", statement)
