"""The command line, run in this process."""

from __future__ import annotations

import logging
import os

import pytest

from flows.cli import main


@pytest.fixture(autouse=True)
def _on_its_own(tmp_path_factory, monkeypatch):
    """The commands leave this process's environment and loggers as they were, and git's settings of the user alone."""
    environment = dict(os.environ)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.delenv("COPAL_WORKSPACE", raising=False)
    monkeypatch.setattr("flows.terminal.progress._LONG", 1e9)  # no progress on a busy machine: errors stand alone
    yield
    os.environ.clear()
    os.environ.update(environment)
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).propagate = True


@pytest.fixture(autouse=True)
def _by_hand(request):
    """Commands run without Prefect, but where a test asks for a server."""
    if "prefect" not in request.fixturenames:
        request.getfixturevalue("by_hand")


@pytest.fixture
def run(capsys):
    """run(*arguments) -> (exit code, standard output, standard error)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def refused(run):
    """refused(*arguments) -> the one line that a refused command prints."""

    def call(*arguments: object) -> str:
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("copal: ")
        assert err.count("\n") == 1
        return err

    return call
