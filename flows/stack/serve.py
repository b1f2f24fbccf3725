"""`python -P -m flows.stack.serve NAME FILE SOCKET...`: one server of `copal up`, in a process of its own.

NAME is `prefect` or `mlflow`; FILE holds the credentials; each SOCKET is the number of a bound socket that the process
inherits. `prefect server start` and `mlflow server` bind by themselves, and have no place for the guard.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from flows.stack.access import Access, read_access
from flows.stack.guard import guarded

if TYPE_CHECKING:
    from starlette.types import ASGIApp


def main(name: str, file: str, *numbers: str) -> None:
    import uvicorn

    access = read_access(Path(file))
    app = _prefect(access) if name == "prefect" else _mlflow(access)
    guard = guarded(app, access, checks_itself=name == "prefect")
    server = uvicorn.Server(uvicorn.Config(guard, log_level="warning", access_log=False, proxy_headers=False))
    server.run([socket.socket(fileno=int(number)) for number in numbers])


def _prefect(access: Access) -> ASGIApp:
    """Prefect's server with its services, as `prefect server start` runs it; it wants the credentials by itself."""
    os.environ["PREFECT_SERVER_API_AUTH_STRING"] = access.auth_string
    from prefect.server.api.server import create_app

    return create_app(final=True)


def _mlflow(access: Access) -> ASGIApp:
    from flows.registry.server import mlflow_app

    return mlflow_app(os.environ["MLFLOW_BACKEND_STORE_URI"], os.environ["MLFLOW_DEFAULT_ARTIFACT_ROOT"], access.host)


if __name__ == "__main__":
    main(*sys.argv[1:])
