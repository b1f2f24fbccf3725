"""Who may use the servers of `copal up`: the credentials of one stack, and the files that hold them.

Whoever reaches Prefect's API can run commands as its owner, and on a shared machine everybody reaches loopback. So each
stack has credentials of its own, which live as long as it does. They lie in files that only its owner may read, and
never on a command line, which `ps` shows to everybody: a browser that opens a link has it on its own. So the link that
`copal up` prints names a file, and the file holds the links with the credentials.
"""

from __future__ import annotations

import secrets
from base64 import b64encode
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, urlsplit

from copal.files import write_atomic
from flows.stack.state import is_up
from flows.workspace import Workspace

__all__ = [
    "LET_IN",
    "RUNS_PAGE",
    "Access",
    "access_file",
    "access_of",
    "client_environment",
    "forget_access",
    "link_file",
    "model_page",
    "new_access",
    "read_access",
    "write_access",
]


LET_IN = "/copal/in"  # where a server lets a browser in
RUNS_PAGE = "/runs"  # of Prefect's UI


_USER = "copal"


@dataclass(frozen=True, slots=True)
class Access:
    """The credentials of one stack.

    Attributes:
        password: of the user `copal`, on both servers.
        host: the name under which a browser is let in. A cookie knows no ports: set for 127.0.0.1 it would go to the
            servers of everybody else on this machine. Browsers take every name that ends in .localhost for loopback.
    """

    password: str = field(repr=False)
    host: str

    @property
    def auth_string(self) -> str:
        """As Prefect wants it."""
        return f"{_USER}:{self.password}"

    @property
    def basic(self) -> str:
        """As HTTP's scheme Basic wants it (RFC 7617)."""
        return b64encode(self.auth_string.encode()).decode()


def new_access() -> Access:
    return Access(secrets.token_urlsafe(32), f"copal-{secrets.token_hex(8)}.localhost")


def access_file(workspace: Workspace) -> Path:
    """A file of shell assignments: `set -a; . FILE` lets the commands of Prefect and MLflow in."""
    return workspace.private / "stack.env"


def link_file(workspace: Workspace) -> Path:
    """The page that lets a browser in."""
    return workspace.private / "open.html"


def model_page(model: str) -> str:
    """The page of a registered model in MLflow's UI."""
    return f"/#/models/{model}"


def write_access(workspace: Workspace, access: Access, model: str, api: str, mlflow: str | None) -> None:
    """Write both files.

    Args:
        model: name of the lineage.
        api: URL of the Prefect API.
        mlflow: URL of the MLflow server; None where the stack has none of its own.
    """
    variables = client_environment(access, mlflow=mlflow is not None)
    lines = {"PREFECT_API_URL": api, "COPAL_STACK_HOST": access.host} | variables
    text = "".join(f"{name}={value}\n" for name, value in lines.items())
    write_atomic(access_file(workspace), text, mode=0o600)
    links = "".join(
        f'<p><a href="http://{access.host}:{urlsplit(url).port}{LET_IN}#{access.basic},{quote(page, safe="")}">'
        f"{name}</a></p>\n"
        for name, url, page in (("Prefect", api, RUNS_PAGE), (f"MLflow: {model}", mlflow, model_page(model)))
        if url is not None
    )
    page = f'<!doctype html>\n<meta charset="utf-8">\n<title>copal</title>\n{links}'
    write_atomic(link_file(workspace), page, mode=0o600)


def read_access(file: Path) -> Access:
    """The credentials in a file of `write_access`.

    Raises:
        OSError, KeyError: it cannot be read, or it is no such file.
    """
    found = dict(line.split("=", 1) for line in file.read_text(encoding="utf-8").splitlines() if "=" in line)
    return Access(found["PREFECT_API_AUTH_STRING"].partition(":")[2], found["COPAL_STACK_HOST"])


def access_of(workspace: Workspace, api: str) -> Access | None:
    """The credentials for the Prefect API `api`, where it is that of the stack that runs in the workspace."""
    stack = is_up(workspace)
    if stack is None or stack.prefect.rstrip("/") != api.rstrip("/"):
        return None
    try:
        return read_access(access_file(workspace))
    except (OSError, KeyError):
        return None


def forget_access(workspace: Workspace) -> None:
    access_file(workspace).unlink(missing_ok=True)
    link_file(workspace).unlink(missing_ok=True)


def client_environment(access: Access, *, mlflow: bool) -> dict[str, str]:
    """The variables with which clients of Prefect, and of MLflow where it is the stack's own, are let in.

    A process's variables can be read by its owner alone.
    """
    found = {"PREFECT_API_AUTH_STRING": access.auth_string}
    if mlflow:
        found |= {"MLFLOW_TRACKING_USERNAME": _USER, "MLFLOW_TRACKING_PASSWORD": access.password}
    return found
