"""What stands before the servers of `copal up`: who comes through, and what a browser is given."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from flows.stack.access import LET_IN, Access, new_access
from flows.stack.guard import guarded

ACCESS = Access("a-password", "copal-0123.localhost")
OTHER = new_access()
LET = {"Authorization": f"Basic {ACCESS.basic}"}
HERE = "http://127.0.0.1:5000"
NAMED = f"http://{ACCESS.host}:5000"


async def behind(scope: Any, receive: Any, send: Any) -> None:
    """A server that is glad of whoever comes through."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
        return
    await send({"type": "http.response.start", "status": 299, "headers": []})
    await send({"type": "http.response.body", "body": b"through"})


def ask(
    url: str, method: str = "GET", *, itself: bool = False, app: Any = None, **headers: str | bytes
) -> httpx.Response:
    async def call() -> httpx.Response:
        found = app or guarded(behind, ACCESS, checks_itself=itself)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(found)) as client:
            return await client.request(method, url, headers={k.replace("_", "-"): v for k, v in headers.items()})

    return asyncio.run(call())


def test_with_the_credentials_a_client_comes_through_under_each_name() -> None:
    for name in ("127.0.0.1:5000", "localhost:5000", "[::1]:5000", f"{ACCESS.host}:5000", "127.0.0.1:15000"):
        assert ask(f"http://{name}/x", **LET).status_code == 299


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": f"Basic {OTHER.basic}"},
        {"Authorization": f"Bearer {ACCESS.basic}"},
        {"Authorization": "Basic"},
        {"Authorization": b"Basic \xe9"},
        {"Cookie": "copal="},
        {"Cookie": f"copal={ACCESS.password}"},
    ],
)
def test_without_them_nobody_does(headers: dict[str, str | bytes]) -> None:
    for url in (f"{HERE}/", f"{NAMED}/get-artifact", f"{HERE}/health/x", f"{HERE}/x/health"):
        answer = ask(url, **headers)
        assert (answer.status_code, answer.headers["www-authenticate"].startswith("Basic")) == (401, True)
    assert ask(f"{HERE}/health", "POST", **headers).status_code == 401


def test_whether_a_server_answers_everybody_may_know() -> None:
    assert ask(f"{HERE}/health").status_code == 299


@pytest.mark.parametrize("itself", [False, True])
@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:5000", "127.0.0.1.evil.example", "localhost.", "", "[::1", "x@y"),
        pytest.param(OTHER.host, id="another stack's"),  # drawn, so each process has another
    ],
)
def test_a_foreign_host_is_refused_with_the_credentials_too(host: str, itself: bool) -> None:
    assert ask(f"{HERE}/", itself=itself, Host=host, **LET).status_code == 403


@pytest.mark.parametrize("itself", [False, True])
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "http://127.0.0.1:8000",
        "http://127.0.0.1",
        "https://127.0.0.1:5000",
        "http://localhost:5000",
        "null",
    ],
)
def test_a_foreign_origin_is_refused_with_the_credentials_too(origin: str, method: str, itself: bool) -> None:
    assert ask(f"{HERE}/", method, itself=itself, Origin=origin, **LET).status_code == 403
    assert ask(f"{HERE}/", method, itself=itself, Origin=HERE, **LET).status_code == 299


def test_a_page_of_another_site_gets_nothing_and_a_link_of_it_may_be_followed() -> None:
    for site in ("cross-site", "same-site"):  # another port of 127.0.0.1 is of the same site
        assert ask(f"{HERE}/", Sec_Fetch_Site=site, Sec_Fetch_Mode="no-cors", **LET).status_code == 403
        assert ask(f"{HERE}/", Sec_Fetch_Site=site, Sec_Fetch_Mode="navigate", **LET).status_code == 299
    assert ask(f"{HERE}/", Sec_Fetch_Site="same-origin", Sec_Fetch_Mode="cors", **LET).status_code == 299


@pytest.mark.parametrize(
    ("headers", "came"),
    [
        ([(b"host", b"127.0.0.1:5000")], True),
        ([(b"host", b"127.0.0.1:5000"), (b"origin", b"http://127.0.0.1:5000")], True),
        ([(b"host", b"127.0.0.1:5000"), (b"origin", b"http://evil.example")], False),
        ([(b"host", b"evil.example")], False),
        ([(b"host", b"127.0.0.1:5000"), (b"host", b"evil.example")], False),
        ([], False),
    ],
)
def test_sockets_are_for_pages_of_the_server_only(headers: list[tuple[bytes, bytes]], came: bool) -> None:
    sent: list[str] = []

    async def send(message: Any) -> None:
        sent.append(message["type"])

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    scope = {"type": "websocket", "path": "/api/events/in", "headers": headers}
    asyncio.run(guarded(behind, ACCESS, checks_itself=True)(scope, receive, send))
    assert sent == ["websocket.accept" if came else "websocket.close"]
    sent.clear()
    asyncio.run(guarded(behind, ACCESS, checks_itself=False)(scope, receive, send))
    assert sent == ["websocket.close"], "without credentials"


# --- a browser


def test_a_browser_is_let_in_under_its_own_name_only_and_the_cookie_is_for_no_other() -> None:
    app = guarded(behind, ACCESS, checks_itself=False)
    assert ask(f"{HERE}{LET_IN}", app=app).status_code == 401, "a cookie of 127.0.0.1 goes to every port"
    page = ask(f"{NAMED}{LET_IN}", app=app)
    assert page.status_code == 200
    assert ACCESS.password not in page.text
    assert ACCESS.basic not in page.text
    assert ask(f"{NAMED}{LET_IN}", "POST", app=app).status_code == 403
    assert ask(f"{NAMED}{LET_IN}", "POST", app=app, Authorization=f"Basic {OTHER.basic}").status_code == 403
    given = ask(f"{NAMED}{LET_IN}", "POST", app=app, Origin=NAMED, **LET).headers["set-cookie"]
    cookie, *attributes = given.split("; ")
    assert {"HttpOnly", "SameSite=strict", "Path=/"} == set(attributes)
    assert ask(f"{NAMED}/", app=app, Cookie=cookie).status_code == 299
    assert ask(f"{HERE}/", app=app, Cookie=cookie).status_code == 401
    assert ask(f"{NAMED}/", Cookie=cookie).status_code == 401, "a cookie of an earlier server"


def test_credentials_are_of_one_stack_and_are_not_shown() -> None:
    assert OTHER.password != new_access().password
    assert len(OTHER.password) >= 43  # 256 bits
    assert OTHER.host != new_access().host
    assert OTHER.password not in repr(OTHER)
