"""The Prefect server that runs are told to, where one is named: whether it is there and lets us in, said at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from copal.errors import CopalError, first_line

__all__ = ["ServerError", "on_server"]

_SECONDS = 5.0
_VARIABLES = {"PREFECT_API_URL", "PREFECT_PROFILE", "PREFECT_PROFILES_PATH"}  # Prefect reads them in any case


class ServerError(CopalError):
    """The Prefect server does not answer, or does not let us in."""


@contextmanager
def on_server() -> Iterator[bool]:
    """Whether a Prefect server is named: then it is there and lets us in, and flows may run inside of the `with`.

    Where environment, profile and settings files name none, steps are taken without Prefect: see `flows.by_hand`.

    Raises:
        ServerError: it does not answer within 5 seconds; it wants another auth string; it went away under the flow.
    """
    url = _named()
    if url is None:
        yield False
        return
    import httpx

    _check(url)
    try:
        yield True
    except httpx.HTTPError as error:
        raise ServerError(
            f"the Prefect server at {url} went away while this ran ({first_line(error)}): start it and run this again, "
            "what is finished is kept"
        ) from error


def _named() -> str | None:
    """The URL of the Prefect server that is named, if one is.

    Prefect takes more than a second to say so. It is asked where there is, in the places that it reads, something
    that may name one.
    """
    home = Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser()
    project = Path("pyproject.toml")
    if (
        "prefect" in sys.modules
        or not {name.upper() for name in os.environ}.isdisjoint(_VARIABLES)
        or any(file.exists() for file in (home / "profiles.toml", Path("prefect.toml"), Path(".env")))
        or (project.is_file() and b"tool.prefect" in project.read_bytes())
    ):
        from prefect.settings import PREFECT_API_URL

        return cast("str | None", PREFECT_API_URL.value()) or None  # empty: Prefect would start one
    return None


def _check(url: str) -> None:
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    with (
        temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
        get_client(httpx_settings={"timeout": _SECONDS}, sync_client=True) as client,
    ):
        problem = client.api_healthcheck()  # everybody may ask that
        if problem is None:
            try:
                client.api_version()
            except httpx.HTTPStatusError as error:
                raise ServerError(
                    f"the Prefect server at {url} does not let us in (HTTP {error.response.status_code}): set "
                    "PREFECT_API_AUTH_STRING to its auth string, or unset PREFECT_API_URL to run without one"
                ) from error
    if problem is not None:
        raise ServerError(
            f"the Prefect server at {url} does not answer ({first_line(problem)}): start it, or unset PREFECT_API_URL "
            "(and `prefect profile use` another profile) to run without one"
        )
