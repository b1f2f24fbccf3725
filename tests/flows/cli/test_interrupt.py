"""Ctrl-C in a terminal, which reaches every process of the command: one line of ours, and the next run goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress

from flows.isolated import isolated_environment, isolated_python
from flows.step.resolve import UNFINISHED
from support.waiting import until

_SECONDS = 20.0  # on a busy machine; on a quiet one it took 4


def test_a_step_ends_with_one_line_and_nothing_of_prefect(bench, tmp_path):
    bench.set("windows: 8", "windows: 12000")  # it takes half a minute
    bench.commit("code", 0, documents=9000)
    environment = isolated_environment() | {"HOME": str(tmp_path), "PREFECT_HOME": str(tmp_path / "prefect")}
    environment.pop("PREFECT_API_URL", None)
    errors = tmp_path / "errors"
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            isolated_python("flows.cli", "watch", "--once", "--workspace", str(bench.root)),
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=environment,
            start_new_session=True,
            text=True,
        )
        try:
            parts = f"*/{UNFINISHED}/*/process-0/statistics-*"
            until(lambda: list(bench.workspace.runs.glob(parts)), 120, "statistics of a block")
            began = time.monotonic()
            os.killpg(process.pid, signal.SIGINT)
            code = process.wait(timeout=120)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert (code, time.monotonic() - began < _SECONDS) == (130, True)
    said = [
        line for line in errors.read_text().splitlines() if "of 6: " not in line and not line.startswith("starting: ")
    ]
    assert said == ["copal: interrupted"]
    assert bench.registry.head().number == 1
