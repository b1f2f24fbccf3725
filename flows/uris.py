"""What may be shown or stored of what a user gives: URIs without their passwords and tokens. The only place for it.

A password is for the store that it opens. What is printed, logged, registered, put into a file or onto a command line
passes through here; a process gets one by an environment variable or a file of mode 0600.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

__all__ = ["Login", "cause", "has_secrets", "is_server", "local_path", "split_login", "without_secrets"]

Login = tuple[str, str | None]
"""A user, or a token in the place of one, and the password, if any."""

_TOKENS = (
    "(?:ssl)?password|passwd|pwd|pass|passphrase|[a-z_-]*token|[a-z_-]*secret|[a-z_-]*key|sig|[a-z-]*signature|"
    "[a-z-]*credential"
)


def without_secrets(text: str) -> str:
    """`text` without the passwords and tokens in the URIs that it holds."""

    def bare(found: re.Match[str]) -> str:
        scheme, user = found.groups()
        named = "" if scheme.lower() in ("http", "https") else f"{user.split(':')[0]}@"  # https://TOKEN@... has no user
        return f"{scheme}://{named}"

    # A password that is not spelled as URIs want it may hold anything; after a host comes a port, and then a path.
    text = re.sub(r"([A-Za-z][A-Za-z0-9+.-]*://[^:/?#@\s\[]*):(?!\d*(?:[/?#,;'\")>\]}\s]|$))\S*@", r"\1@", text)
    text = re.sub(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#\s]*)@", bare, text)
    return re.sub(rf"([?&](?:{_TOKENS})=)[^&\s'\"]*", r"\1...", text, flags=re.IGNORECASE)


def has_secrets(text: str) -> bool:
    """Whether `text` holds a URI with a password or token."""
    return without_secrets(text) != text


def cause(error: BaseException) -> BaseException | None:
    """`error`, for `raise ... from`; None where it or what it came from tells a secret, for tracebacks are stored."""
    found: BaseException | None = error
    while found is not None:
        if has_secrets(str(found)):
            return None
        found = found.__cause__ or found.__context__
    return error


def local_path(uri: str) -> Path | None:
    """The folder that `uri` names on this machine; None if it is remote."""
    parts = urlsplit(uri)
    if parts.scheme == "file":  # whatever host it names, MLflow reads it here
        return Path(unquote(parts.path))
    return None if parts.scheme else Path(uri)


def is_server(uri: str | None) -> bool:
    """Whether a store is an HTTP server."""
    return uri is not None and uri.lower().startswith(("http://", "https://"))  # also of what is no URI


def split_login(url: str) -> tuple[str, Login | None]:
    """A URL without the password in it; of HTTP, without the user as well, and both of them.

    A command line is for everybody to read: what is started gets the URL there, and the login in another way. Schemes
    other than HTTP have no use for a password.
    """
    parts = urlsplit(url)
    login, at, host = parts.netloc.rpartition("@")
    if not at:
        return url, None
    user, colon, password = login.partition(":")
    if parts.scheme.lower() not in ("http", "https"):
        return urlunsplit(parts._replace(netloc=f"{user}@{host}")), None
    return urlunsplit(parts._replace(netloc=host)), (unquote(user), unquote(password) if colon else None)
