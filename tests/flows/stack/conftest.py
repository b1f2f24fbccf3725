"""The stores that a team shares."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.stack.mlflow_users import ROLES, MlflowServer, ensure_roles, ensure_user
from support.buckets import S3Server
from support.ledgers import run_sql
from support.servers import PostgresServer, PrefectServer, with_users
from support.teams import BUCKETS, PASSWORD, Stores


@pytest.fixture(scope="module")
def stores(
    tmp_path_factory: pytest.TempPathFactory, mlflow_template: Path, postgresql: PostgresServer
) -> Iterator[Stores]:
    """An MLflow server with users whose artifacts are on S3, as the data is; a Prefect server on PostgreSQL that wants
    its auth string; and a database in which each role has its rights.
    """
    if importlib.util.find_spec("flask_wtf") is None:
        pytest.skip("MLflow's basic-auth needs Flask-WTF: pip install 'mlflow[auth]'")
    folder = tmp_path_factory.mktemp("stores")
    for name in ("mlflow", "prefect"):
        (folder / name).mkdir()
    s3 = S3Server()
    server = with_users(
        folder / "mlflow",
        mlflow_template,
        PASSWORD.format("admin"),
        serves=True,
        artifacts="s3://artifacts/mlflow",
        environment=s3.environment,
    )
    of_prefect = postgresql.uri(postgresql.new_database()).replace("psycopg2", "asyncpg")
    prefect = PrefectServer(folder / "prefect", of_prefect, "copal:the auth string")
    try:
        s3.start()
        for bucket in BUCKETS:
            s3.new_bucket(bucket)
        server.start()
        prefect.start()
        administered = MlflowServer(server.uri, "admin", PASSWORD.format("admin"))
        ensure_roles(administered)
        database = postgresql.new_database()
        for role in ROLES:
            ensure_user(administered, role, PASSWORD.format(role), role)
            run_sql(postgresql.uri("postgres"), f"CREATE ROLE {role}_{database} LOGIN")
        run_sql(postgresql.uri(database), f"GRANT CREATE ON SCHEMA public TO worker_{database}")
        worker = f"ALTER DEFAULT PRIVILEGES FOR ROLE worker_{database} IN SCHEMA public GRANT"
        run_sql(postgresql.uri(database), f"{worker} SELECT ON TABLES TO reader_{database}")
        run_sql(postgresql.uri(database), f"{worker} SELECT, INSERT, UPDATE ON TABLES TO promoter_{database}")
        yield Stores(server, postgresql, prefect, s3, database, folder)
    finally:
        prefect.kill()
        server.kill()
        s3.kill()
