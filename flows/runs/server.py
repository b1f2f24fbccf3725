"""Whether the Prefect server that runs would be told to is there and lets us in: said at once, not after half a minute
of trying.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from copal.errors import CopalError

__all__ = ["ServerError", "check_server", "with_server"]

_SECONDS = 5.0


class ServerError(CopalError):
    """The Prefect server does not answer, or does not let us in."""


def check_server() -> None:
    """Check that the server that environment or profile name answers us; where they name none, flows start their own.

    Raises:
        ServerError: it does not, within 5 seconds; it wants another auth string.
    """
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    url = PREFECT_API_URL.value()
    if url is None:
        return
    with (
        temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
        get_client(httpx_settings={"timeout": _SECONDS}, sync_client=True) as client,
    ):
        problem = client.api_healthcheck()  # everybody may ask that
        if problem is None:
            try:
                client.api_version()
            except httpx.HTTPStatusError as error:
                raise _stranger(url, error.response.status_code) from error
    if problem is not None:
        reason = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        raise ServerError(
            f"the Prefect server at {url} does not answer ({reason}): start it, or unset PREFECT_API_URL (and "
            "`prefect profile use` another profile) to run without one"
        )


@contextmanager
def with_server() -> Iterator[None]:
    """Check the server, as `check_server` does; then a flow may run in here.

    Raises:
        ServerError: also where the server went away under the flow.
    """
    import httpx
    from prefect.settings import PREFECT_API_URL

    check_server()
    try:
        yield
    except httpx.HTTPError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        place = f" at {PREFECT_API_URL.value()}" if PREFECT_API_URL.value() else ""
        raise ServerError(
            f"the Prefect server{place} went away while this ran ({reason}): start it and run "
            "this again, what is finished is kept"
        ) from error


def _stranger(url: str, status: int) -> ServerError:
    return ServerError(
        f"the Prefect server at {url} does not let us in (HTTP {status}): set PREFECT_API_AUTH_STRING to its auth "
        "string, or unset PREFECT_API_URL to run without one"
    )
