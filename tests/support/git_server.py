"""A git repository over HTTP that wants a user and a password, and looks at who asks: the plain files of `.git`."""

from __future__ import annotations

import threading
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def command_lines() -> set[bytes]:
    """Of all processes of this machine, as every user of it can read them."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            found.add(path.read_bytes())
    return found


class GitServer(ThreadingHTTPServer):
    """Serves the files of a folder to one user; after a commit git has to be told `update-server-info`.

    Attributes:
        lines: the command lines of all processes, looked at while git asks.
        refused: how many requests came without the password.
    """

    def __init__(self, folder: Path, user: str, password: str) -> None:
        wanted = f"Basic {b64encode(f'{user}:{password}'.encode()).decode()}"
        self.lines: set[bytes] = set()
        self.refused = 0
        server = self

        class Handler(SimpleHTTPRequestHandler):
            def __init__(self, *arguments: object) -> None:
                super().__init__(*arguments, directory=str(folder))  # type: ignore[arg-type]

            def do_GET(self) -> None:
                server.lines |= command_lines()
                if self.headers["Authorization"] == wanted:
                    return super().do_GET()
                server.refused += 1
                self.send_response(401)
                self.send_header("WWW-Authenticate", "Basic")
                self.end_headers()
                return None

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://{user}:{password}@127.0.0.1:{self.server_address[1]}/.git"


@contextmanager
def git_server(folder: Path, user: str, password: str) -> Iterator[GitServer]:
    with GitServer(folder, user, password) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
