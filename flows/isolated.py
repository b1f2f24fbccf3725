"""Python processes that import nothing from the folder where they run: a user may have a package `flows` there."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["isolated_environment", "isolated_python"]

_INSTALLED = ("site-packages", "dist-packages")  # every Python of the same environment looks there by itself


def isolated_python(module: str, *arguments: str) -> list[str]:
    """The command line of `python -m MODULE ARGUMENTS` that imports nothing from the folder where it runs."""
    return [sys.executable, "-P", "-m", module, *arguments]


def isolated_environment() -> dict[str, str]:
    """This process's environment for such a process: what it starts is isolated too, and runs this very copal.

    PYTHONPATH stays; where copal is run from a checkout that is not installed, the checkout comes first in it.
    """
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    home = Path(__file__).parents[1]
    places = [place for place in environment.get("PYTHONPATH", "").split(os.pathsep) if place]
    if home.name not in _INSTALLED and str(home) not in places:
        environment["PYTHONPATH"] = os.pathsep.join((str(home), *places))
    return environment
