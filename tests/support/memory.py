"""How much memory a program takes: in a process of its own, as Linux tells it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType


def memory(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process; not ru_maxrss, which a process has from the one that started it."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return 1024 * int(found[1])


def measured(program: ModuleType, *arguments: object) -> dict[str, float]:
    """What the program, run with these arguments, says of itself as JSON."""
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, str(program.__file__), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"},
        stdout=subprocess.PIPE,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout)
    print(found)
    return found
