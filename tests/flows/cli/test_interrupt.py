"""Ctrl-C in a terminal, which reaches every process of the command: one line of ours, and the next run goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress

import pytest

from flows.isolated import isolated_environment, isolated_python
from flows.step.resolve import UNFINISHED
from support.waiting import until

_SECONDS = 10.0  # five are promised; beside a computation on every core it took 2 by hand and 4 as a flow


@pytest.fixture
def server(request) -> str | None:
    """The URL of the Prefect server that is named; None for none."""
    if request.param == "by hand":
        return None
    from prefect.settings import PREFECT_API_URL

    request.getfixturevalue("prefect")
    return PREFECT_API_URL.value()


@pytest.mark.parametrize("server", ["by hand", "on a server"], indirect=True)
def test_a_step_ends_soon_with_one_line_and_nothing_of_prefect(bench, tmp_path, server):
    bench.set("windows: 8", "windows: 6000")  # it takes a quarter of a minute
    bench.commit("code", 0, documents=4500)
    environment = isolated_environment() | {"HOME": str(tmp_path), "PREFECT_HOME": str(tmp_path / "prefect")}
    environment.pop("PREFECT_API_URL", None)
    if server is not None:
        environment["PREFECT_API_URL"] = server
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
    progress = ("comparing ", "starting: ", "code, ", "version 1, ")
    said = [line for line in errors.read_text().splitlines() if not line.startswith(progress)]
    assert said == ["copal: interrupted"]
    assert bench.registry.head().number == 1
