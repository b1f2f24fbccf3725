from __future__ import annotations

import io
import sys

import pytest

from flows.terminal import progress as terminal
from flows.terminal.progress import console, progress_bar


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_a_long_stage_is_two_lines_and_a_short_one_none(clock, capsys):
    with progress_bar() as progress:
        for block in range(1, 31):
            progress("prune", block, 30)
            clock[0] += 1
        progress("copy", 0, 10)
        clock[0] += 1
        progress("copy", 10, 10)
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "prune: 10%\nprune: 100%, 29 s\n"


def test_a_stage_that_comes_again_counts_anew(clock, capsys):
    with progress_bar() as progress:
        for seconds in (5, 3):
            progress("evaluate", 0, 1)
            clock[0] += seconds
            progress("evaluate", 1, 1)
    assert capsys.readouterr().err == "evaluate: 100%, 5 s\nevaluate: 100%, 3 s\n"


def test_on_a_terminal_a_bar_for_each_stage(monkeypatch):
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    with progress_bar() as progress:
        progress("download", 0, 1)
        progress("download", 1, 1)
        for block in (1, 2, 1, 2):
            progress("evaluate", block, 2)
    shown = screen.getvalue()
    assert "download" in shown
    assert "evaluate" in shown
    assert "100%" in shown


def test_what_goes_into_a_pipe_is_plain_and_wide(capsys):
    console().print("x" * 100 + " " + "[bold]y[/]")
    assert capsys.readouterr().out == "x" * 100 + " [bold]y[/]\n", "brackets are no styles"
