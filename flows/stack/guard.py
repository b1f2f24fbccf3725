"""Stands before a server of `copal up`: only whom `flows.stack.access` lets in comes through.

It is a part of the server's own process, an ASGI application around the server's: MLflow's own authentication needs
packages and a database of users for what is one user, and checks no origin of another port of this machine; Prefect's
own checks no host and no origin.

What it refuses, and why:
- a foreign Host: a web page whose name was made to mean 127.0.0.1 (DNS rebinding);
- a foreign Origin, or what a browser says comes from another site: a page that a browser shows sends requests of its
  own, and the page may be of another port of this machine. For sockets too, to which browsers apply no such rule;
- whoever brings neither the credentials (HTTP's scheme Basic: clients) nor the cookie (browsers).

A browser brings the credentials after the # of a link, which is sent to no server and stands in no log.
"""

from __future__ import annotations

import hmac
import secrets
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from flows.stack.access import LET_IN, Access

if TYPE_CHECKING:
    from starlette.requests import HTTPConnection
    from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["guarded"]


_COOKIE = "copal"


_LOOPBACK = ("127.0.0.1", "localhost", "::1")


# Prefect's pages take the credentials from this place, which belongs to host and port.
_PAGE = """\
<!doctype html>
<meta charset="utf-8">
<title>copal</title>
<p id="said">One moment.</p>
<script>
const [basic, page] = location.hash.slice(1).split(",").map(decodeURIComponent);
history.replaceState(null, "", location.pathname);
fetch(location.pathname, {method: "POST", headers: {Authorization: "Basic " + basic}}).then(answer => {
  if (answer.ok) {
    localStorage.setItem("prefect-password", basic);
    location.replace(/^\\/(?![\\/\\\\])/.test(page || "") ? page : "/");  // a page of this server, and of no other
  } else {
    document.getElementById("said").textContent = "This link is of a copal up that has ended. Open the new one.";
  }
});
</script>
"""


def guarded(app: ASGIApp, access: Access, *, checks_itself: bool) -> ASGIApp:
    """`app` behind these checks.

    Args:
        checks_itself: `app` asks for the credentials by itself, in requests and in sockets; Host and Origin are checked
            here.
    """
    from starlette.requests import HTTPConnection
    from starlette.responses import PlainTextResponse

    session = secrets.token_urlsafe(32)

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):  # the server begins or ends
            return await app(scope, receive, send)
        asked = HTTPConnection(scope)
        refusal = _foreign(asked, access.host)
        if refusal is not None:
            return await _refuse(scope, receive, send, PlainTextResponse(refusal, 403))
        if scope["type"] == "http" and scope["path"] == LET_IN and _hostname(asked) == access.host:
            return await _let_in(asked, access, session)(scope, receive, send)
        if checks_itself or _is_probe(scope) or _is_let_in(asked, access, session):
            return await app(scope, receive, send)
        said = "Not let in: open the link that `copal up` printed, or bring the credentials of .copal/stack.env.\n"
        challenge = {"WWW-Authenticate": 'Basic realm="copal", charset="UTF-8"'}
        return await _refuse(scope, receive, send, PlainTextResponse(said, 401, challenge))

    return answer


async def _refuse(scope: Scope, receive: Receive, send: Send, answer: ASGIApp) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})  # before it was accepted: the server answers 403
    else:
        await answer(scope, receive, send)


def _foreign(asked: HTTPConnection, host: str) -> str | None:
    """Why the request is not meant for this server, or not sent by a page of it; None where all is well."""
    hosts, origins = asked.headers.getlist("host"), asked.headers.getlist("origin")
    if len(hosts) != 1 or _hostname(asked) not in (*_LOOPBACK, host):
        return "This server does not answer to that Host.\n"
    if any(origin.lower() != f"http://{hosts[0].lower()}" for origin in origins):
        return "This server does not answer to pages of that Origin.\n"
    site, mode = asked.headers.get("sec-fetch-site", "none"), asked.headers.get("sec-fetch-mode")
    if site not in ("none", "same-origin") and mode != "navigate":  # a link may be followed from anywhere
        return "This server does not answer to pages of other sites.\n"
    return None


def _hostname(asked: HTTPConnection) -> str | None:
    """Of the Host, without the port: a tunnel may have another one."""
    try:
        return urlsplit(f"//{asked.headers.get('host', '')}").hostname
    except ValueError:
        return None


def _is_probe(scope: Scope) -> bool:
    return bool(scope["type"] == "http" and scope["method"] == "GET" and scope["path"] == "/health")


def _is_let_in(asked: HTTPConnection, access: Access, session: str) -> bool:
    cookie = asked.cookies.get(_COOKIE, "")
    return _has_credentials(asked, access) or (_hostname(asked) == access.host and _equal(cookie, session))


def _has_credentials(asked: HTTPConnection, access: Access) -> bool:
    scheme, _, given = asked.headers.get("authorization", "").partition(" ")
    return scheme.lower() == "basic" and _equal(given.strip(), access.basic)


def _equal(given: str, wanted: str) -> bool:
    return hmac.compare_digest(given.encode(), wanted.encode())  # in a time that does not tell how much was right


def _let_in(asked: HTTPConnection, access: Access, session: str) -> ASGIApp:
    """The page that a link of `copal up` opens, and what that page asks for with the credentials: the cookie."""
    from starlette.responses import HTMLResponse, Response

    if asked.scope["method"] == "GET":
        return HTMLResponse(_PAGE, headers={"Cache-Control": "no-store", "X-Frame-Options": "DENY"})
    if asked.scope["method"] != "POST" or not _has_credentials(asked, access):
        return Response(status_code=403)
    response = Response(status_code=204)
    response.set_cookie(_COOKIE, session, httponly=True, samesite="strict")
    return response
