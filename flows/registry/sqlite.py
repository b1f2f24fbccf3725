"""The SQLite database of a registry: whether it can be opened, and that what it names lies in its own workspace.

MLflow writes whole paths into its database. Those below the artifacts of the workspace are brought up to date when the
workspace is found at another place, so that a workspace can be moved and copied, and no copy writes into another.
"""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

from flows.registry.errors import RegistryError

__all__ = ["is_own", "locked_advice", "open_database", "sqlite_file"]

_BUSY = 30  # seconds to wait for others' transactions
_LOCATIONS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def sqlite_file(tracking_uri: str) -> Path | None:
    """The file of an SQLite store; None for other stores."""
    scheme, _, path = tracking_uri.partition(":///")
    return Path(path.partition("?")[0]) if scheme.partition("+")[0] == "sqlite" else None


def is_own(tracking_uri: str, artifact_root: Path) -> bool:
    """Whether a database lies beside its artifacts: then it is their workspace's own, and wanders with them."""
    database = sqlite_file(tracking_uri)
    return database is not None and database.resolve().parent == artifact_root.resolve().parent


def open_database(tracking_uri: str, artifact_root: Path) -> None:
    """Check that the database of a store can be opened, where it is SQLite and there already. In a workspace's own,
    locations that were written at another place are made those of this one, in one transaction.

    Raises:
        RegistryError: it is no database, it is damaged, others do not let it go for half a minute, or it cannot be
            written where that is needed.
    """
    database, root = sqlite_file(tracking_uri), artifact_root
    if database is None or not database.exists():
        return
    try:
        with contextlib.closing(_connect(database)) as connection:
            connection.execute("PRAGMA schema_version").fetchone()
            if is_own(tracking_uri, root) and _other_places(connection, root):
                _bring_here(connection, root)
    except sqlite3.Error as error:
        advice = locked_advice(str(error)) or "bring back a copy, or name another store"
        raise RegistryError(f"MLflow store {database}: {error}; {advice}") from error


def locked_advice(reason: str) -> str | None:
    """What to do where SQLite gave this reason; None where it does not say that another process has the database."""
    if "database is locked" not in reason:
        return None
    return "it is in use by another process, and whole: wait for that one, or end it (`fuser` names it), and try again"


def _connect(database: Path) -> sqlite3.Connection:
    # isolation_level=None: we begin transactions, not the driver.
    return sqlite3.connect(f"{database.resolve().as_uri()}?mode=rw", uri=True, isolation_level=None, timeout=_BUSY)


def _other_places(connection: sqlite3.Connection, root: Path) -> set[str]:
    """The URIs that the folder of the artifacts had when copal made the experiments in the database."""
    if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'experiments'").fetchone() is None:
        return set()
    ends = "/" + "/".join(root.parts[-2:])  # /.copal/artifacts
    found = connection.execute("SELECT name, artifact_location FROM experiments WHERE artifact_location LIKE 'file:%'")
    places = {location.removesuffix(f"/{name}") for name, location in found if location.endswith(f"{ends}/{name}")}
    return places - {root.resolve().as_uri()}


def _bring_here(connection: sqlite3.Connection, root: Path) -> None:
    here = root.resolve().as_uri()
    connection.execute("BEGIN IMMEDIATE")  # an error closes the connection, and nothing of this is kept
    for place in _other_places(connection, root):
        for table, column in _LOCATIONS:
            connection.execute(
                f"UPDATE {table} SET {column} = :here || substr({column}, length(:place) + 1) "
                f"WHERE substr({column}, 1, length(:place) + 1) = :place || '/'",
                {"here": here, "place": place},
            )
    connection.execute("COMMIT")
