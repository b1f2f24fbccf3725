"""MLflow's server as an ASGI application."""

from __future__ import annotations

import os
import uuid
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp

__all__ = ["mlflow_app"]


def mlflow_app(store: str, artifacts: str, host: str) -> ASGIApp:
    """MLflow's server in this process. Artifacts do not go through it: clients write them where the experiment says.

    `mlflow server` starts another process for it and tells it all of this by these variables, which is why they are
    set, once, before the modules that read them are imported. It has no place for what stands before the application.

    Args:
        store: URI of its database, which is made or brought up to date.
        artifacts: URI under which the artifacts of new experiments go.
        host: the name that the server answers to, beside those of loopback.
    """
    # Patterns, with any port: a tunnel has one of its own.
    names = [f"{name}:*" for name in ("127.0.0.1", "localhost", "[[]::1]", host)]
    os.environ |= {
        "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join(names),
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": f"http://{host}:*",
        "_MLFLOW_SERVER_BOOT_ID": uuid.uuid4().hex,  # by this MLflow knows a server, which runs no code of its users
    }
    from mlflow.server import constants
    from mlflow.server.handlers import initialize_backend_stores

    os.environ |= {
        constants.BACKEND_STORE_URI_ENV_VAR: store,
        constants.REGISTRY_STORE_URI_ENV_VAR: store,
        constants.ARTIFACT_ROOT_ENV_VAR: artifacts,
    }
    initialize_backend_stores(store, store, artifacts)
    from mlflow.server.fastapi_app import app

    return app  # type: ignore[no-any-return]
