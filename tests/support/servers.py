"""Real servers that tests start, kill and start again: MLflow, Prefect and PostgreSQL."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from support.ledgers import run_sql


def free_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def started(
    command: Sequence[str], environment: Mapping[str, str], folder: Path, health: str
) -> subprocess.Popen[bytes]:
    """A server that runs in `folder`, with its log there; it answers at the URL `health`."""
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            command, env=os.environ | environment, cwd=folder, stdout=log, stderr=log, start_new_session=True
        )
    pause = threading.Event()
    for _ in range(1200):
        assert process.poll() is None, (folder / "log").read_text()
        with contextlib.suppress(OSError), urllib.request.urlopen(health, timeout=5):
            return process
        pause.wait(0.1)
    raise AssertionError((folder / "log").read_text())


def killed(process: subprocess.Popen[bytes] | None) -> None:
    """kill -9 to all of its group; nothing where there is none, or that was done."""
    if process is not None and process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class MlflowServer:
    """A real MLflow server on a database of its own, that can be killed and started again.

    Args:
        database: a file of SQLite, of which it gets a copy; or the URI of one on a server.
        serves: artifacts go through it, into a folder of its own, and each request is a line of its log.
        artifacts: where they go instead, as `s3://bucket/path`.
        options, environment: more of what it is started with.
    """

    def __init__(
        self,
        folder: Path,
        database: Path | str,
        *,
        serves: bool = False,
        artifacts: str | None = None,
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        if isinstance(database, Path):
            database = f"sqlite:///{shutil.copyfile(database, folder / 'mlflow.db')}"
        self._database = database
        self.folder = folder
        self._options = tuple(options)
        self._environment = dict(environment or {})
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None
        self._artifacts = ["--no-serve-artifacts"]
        if serves:
            self._artifacts = [
                *("--serve-artifacts", "--artifacts-destination", artifacts or str(folder / "artifacts")),
                *("--uvicorn-opts", "--access-log --log-level info"),
            ]

    def start(self) -> None:
        """Start it and wait until it answers."""
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)),
            *("--backend-store-uri", self._database),
            *("--workers", "1"),
            *self._artifacts,
            *self._options,
        ]
        environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"} | self._environment
        self._process = started(command, environment, self.folder, f"{self.uri}/health")

    def requests(self) -> list[str]:
        """What it was asked, as `GET /path`; of a server that serves artifacts."""
        return re.findall(r'"([A-Z]+ \S+) HTTP', (self.folder / "log").read_text())

    def kill(self) -> None:
        """kill -9, with its workers; nothing where none runs."""
        killed(self._process)


class PrefectServer:
    """A real Prefect server on a database of PostgreSQL, that lets in whoever knows its auth string."""

    def __init__(self, folder: Path, database: str, auth: str) -> None:
        self.folder, self.auth = folder, auth
        self.database = database.rpartition("/")[2]
        self.port = free_port()
        self.api = f"http://127.0.0.1:{self.port}/api"
        self._environment = {
            "PREFECT_HOME": str(folder / "home"),
            "PREFECT_SERVER_API_AUTH_STRING": auth,
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": database,
            "PREFECT_SERVER_DEPLOYMENTS_CONCURRENCY_SLOT_WAIT_SECONDS": "2",
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        place = ("--host", "127.0.0.1", "--port", str(self.port))
        command = [sys.executable, "-P", "-m", "prefect", "server", "start", *place]
        self._process = started(command, self._environment, self.folder, f"{self.api}/health")

    def kill(self) -> None:
        """kill -9; nothing where none runs."""
        killed(self._process)


AUTH = """[mlflow]
default_permission = NO_PERMISSIONS
database_uri = sqlite:///{database}
admin_username = admin
admin_password = {password}
auth_cache_ttl_seconds = 60
"""


def with_users(
    folder: Path,
    database: Path,
    password: str,
    *,
    serves: bool = False,
    artifacts: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> MlflowServer:
    """An MLflow server that asks everybody who he is; `password` is that of its administrator, `admin`."""
    (folder / "auth.ini").write_text(AUTH.format(database=folder / "auth.db", password=password))
    of_users = {
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "for a test",
    }
    return MlflowServer(
        folder,
        database,
        serves=serves,
        artifacts=artifacts,
        options=("--app-name", "basic-auth"),
        environment={**of_users, **(environment or {})},
    )


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
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        data = str(self.folder / "data")
        if not Path(data).exists():
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

    def kill(self) -> None:
        """End it at once, in what it is doing, as a crash would; it recovers when it starts again."""
        assert self._process is not None
        self._process.send_signal(signal.SIGQUIT)
        self._process.wait()

    def uri(self, database: str, role: str = "copal") -> str:
        return f"postgresql+psycopg2://{role}:a-secret@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        """The name of an empty database."""
        name = f"ledger_{uuid.uuid4().hex[:12]}"
        run_sql(self.uri("postgres"), f"CREATE DATABASE {name}")
        return name

    def dump(self, database: str) -> bytes:
        """All that a database holds, as text."""
        place = ("--host", "127.0.0.1", "--port", str(self.port), "--username", "copal")
        command = [str(self._binaries / "pg_dump"), *place, "--inserts", database]
        return subprocess.run(command, check=True, capture_output=True).stdout

    def new_role(self) -> str:
        """The name of a role that may log in, and nothing else."""
        name = f"role_{uuid.uuid4().hex[:12]}"
        run_sql(self.uri("postgres"), f"CREATE ROLE {name} LOGIN")
        return name
