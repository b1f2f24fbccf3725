"""Another user of the machine, which only root can be for a moment."""

from __future__ import annotations

import json
import os
import pwd
from collections.abc import Callable
from typing import Any


def as_nobody(call: Callable[[], Any]) -> Any:
    """What `call` gives, as JSON, when the user `nobody` calls it; `OSError`s as their class's name.

    In a copy of this process: that user need not be able to read the Python that runs here.
    """
    account = pwd.getpwnam("nobody")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(account.pw_gid)
            os.setuid(account.pw_uid)
            try:
                said = call()
            except OSError as error:
                said = type(error).__name__
            os.write(writing, json.dumps(said).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return json.loads(said)
