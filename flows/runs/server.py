"""Whether the Prefect server that runs would be told to is there: said at once, not after half a minute of trying."""

from __future__ import annotations

from copal.errors import CopalError

__all__ = ["ServerError", "check_server"]

_SECONDS = 5.0


class ServerError(CopalError):
    """The Prefect server does not answer."""


def check_server() -> None:
    """Check that the server that environment or profile name answers; where they name none, flows start their own.

    Raises:
        ServerError: it does not, within 5 seconds.
    """
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    url = PREFECT_API_URL.value()
    if url is None:
        return
    with (
        temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
        get_client(httpx_settings={"timeout": _SECONDS}, sync_client=True) as client,
    ):
        problem = client.api_healthcheck()
    if problem is not None:
        reason = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        raise ServerError(
            f"the Prefect server at {url} does not answer ({reason}): start it, or unset PREFECT_API_URL (and "
            "`prefect profile use` another profile) to run without one"
        )
