"""The Prefect server that runs are told to: whether it is there, said at once, or a temporary one, started early."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from copal.errors import CopalError

__all__ = ["ServerError", "check_server", "server_ready"]

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


@contextmanager
def server_ready() -> Iterator[bool]:
    """At the end of the `with` the server answers that flows will ask; inside is time to import what they need.

    Where environment and profile name no server, Prefect starts one for this process, in a process of its own: that
    takes seconds, in which this one can do something else. Gives whether it is such a one: then steps run here.

    Raises:
        ServerError: see `check_server`; or Prefect's own server did not start.
    """
    from prefect.settings import PREFECT_API_URL

    check_server()
    if PREFECT_API_URL.value() is not None:
        yield False
        return
    import prefect.server.api.server  # noqa: F401 - here: two threads that import would undo each other's warning filters

    with ThreadPoolExecutor(max_workers=1) as pool:
        started = pool.submit(_start)
        yield True
        started.result()


def _start() -> None:
    from prefect.client.orchestration import get_client

    try:
        with get_client(sync_client=True):  # starts it
            pass
    except RuntimeError as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ServerError(f"Prefect's temporary server did not start: {reason}") from error
