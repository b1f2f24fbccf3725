"""The Prefect server that runs are told to: whether it is there and lets us in, said at once; or a temporary one."""

from __future__ import annotations

import atexit
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from copal.errors import CopalError

__all__ = ["ServerError", "check_server", "server_ready", "with_server"]

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
        raise ServerError(
            f"the Prefect server at {url} does not answer ({_reason(problem)}): start it, or unset PREFECT_API_URL "
            "(and `prefect profile use` another profile) to run without one"
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
    # Imported here: two threads that import would undo each other's warning filters.
    from prefect.server.api.server import SubprocessASGIServer

    if SubprocessASGIServer().running:  # since an earlier check of the same process
        yield True
        return
    with ThreadPoolExecutor(max_workers=1) as pool:
        started = pool.submit(_start)
        yield True
        started.result()


@contextmanager
def with_server() -> Iterator[None]:
    """A flow may run in here, after `server_ready`.

    Raises:
        ServerError: the server went away under the flow.
    """
    import httpx
    from prefect.settings import PREFECT_API_URL

    try:
        yield
    except httpx.HTTPError as error:
        place = f" at {PREFECT_API_URL.value()}" if PREFECT_API_URL.value() else ""
        raise ServerError(
            f"the Prefect server{place} went away while this ran ({_reason(error)}): start it and run "
            "this again, what is finished is kept"
        ) from error


def _start() -> None:
    from prefect.client.orchestration import get_client

    # Ctrl-C in a terminal reaches every process of the command: without its server a flow could not say how it ended,
    # and would try to for minutes. What a thread blocks, a process that it starts blocks too.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with get_client(sync_client=True):  # starts it
            pass
    except RuntimeError as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ServerError(f"Prefect's temporary server did not start: {reason}") from error
    atexit.register(_end)  # before Prefect's own


def _end() -> None:
    """End the temporary server at once.

    Prefect's own way gives it five seconds, and it takes them: it waits for clients to close what they have open, and
    they are this process. What runs have told it is in its database.
    """
    from prefect.server.api.server import SubprocessASGIServer

    process = SubprocessASGIServer().server_process
    if process is not None:
        process.kill()
        process.wait()


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _stranger(url: str, status: int) -> ServerError:
    return ServerError(
        f"the Prefect server at {url} does not let us in (HTTP {status}): set PREFECT_API_AUTH_STRING to its auth "
        "string, or unset PREFECT_API_URL to run without one"
    )
