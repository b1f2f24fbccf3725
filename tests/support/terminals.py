"""A command on a terminal of its own, which views, colours and widths depend on."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import termios
from collections.abc import Mapping, Sequence


def on_terminal(command: Sequence[str], environment: Mapping[str, str], columns: int = 80) -> tuple[int, str]:
    """Run a command; its exit code, and all that the terminal was sent."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    sent = b""
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        try:
            while data := _read(ours):
                sent += data
            return process.wait(timeout=60), sent.decode()
        finally:
            os.close(ours)
            process.kill()


def _read(terminal: int) -> bytes:
    """What comes next; nothing where everybody has closed the terminal, which Linux calls an error."""
    try:
        return os.read(terminal, 65536)
    except OSError:
        return b""
