from __future__ import annotations

import io
import re
import sys
import threading

import pytest

from flows.terminal import progress as terminal
from flows.terminal.progress import Stages, console, progress_bar, working


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_a_long_stage_is_a_line_every_half_minute_and_a_short_one_none(clock, capsys):
    with progress_bar() as progress:
        for block in range(1, 91):
            progress("prune", block, 90)
            clock[0] += 1
        progress("copy", 0, 10)
        clock[0] += 1
        progress("copy", 10, 10)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "prune: 3 of 90, 58 s left",
        "prune: 33 of 90, 55 s left",
        "prune: 63 of 90, 27 s left",
        "prune: 89 s",
    ]


def test_a_step_says_what_for_which_of_how_many_how_fast_and_how_large(clock, capsys, monkeypatch):
    monkeypatch.setattr("flows.machine.memory_used", lambda: 1_300_000_000)
    stages = Stages(about="code", order=("fetch", "statistics", "prune"), tokens={"statistics": 12000})
    with progress_bar(stages) as progress:
        progress("statistics", 0, 1)
        clock[0] += 10
        progress("statistics", 1, 4)
    assert capsys.readouterr().err.splitlines() == [
        "code, 2 of 3: statistics: 1 of 4, 300 tokens/s, 1.3 GB of memory, 30 s left"
    ]


def test_a_stage_in_which_nothing_is_reported_is_not_silent(capsys, monkeypatch):
    told = threading.Event()
    monkeypatch.setattr(terminal, "_LONG", 0.01)
    monkeypatch.setattr(terminal, "write", lambda line, stream: told.set())
    with terminal.working("starting"):
        assert told.wait(timeout=60)


def test_a_stage_that_comes_again_counts_anew(clock, capsys):
    with progress_bar() as progress:
        for seconds in (5, 3):
            progress("evaluate", 0, 1)
            clock[0] += seconds
            progress("evaluate", 1, 1)
    assert capsys.readouterr().err == "evaluate: 5.0 s\nevaluate: 3.0 s\n"


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
    assert "2 of 2" in shown


def test_a_line_that_is_told_meanwhile_stays_and_the_view_does_not(monkeypatch):
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    with working("looking") as tell:
        assert sys.stdout is screen, "libraries that are imported meanwhile keep it"
        tell("another process moves an alias \x1b]0;of https://me:secret@host/x")
    shown = screen.getvalue()
    assert "looking" in shown
    assert "another process moves an alias \\x1b]0;of https://host/x\n" in shown
    assert shown.endswith("\x1b[2K"), "the view goes"


def test_what_goes_into_a_pipe_is_plain_and_wide(capsys):
    console().print("x" * 100 + " " + "[bold]y[/]")
    assert capsys.readouterr().out == "x" * 100 + " [bold]y[/]\n", "brackets are no styles"


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("domain", ["code", "a-domain-with-a-very-long-name-indeed-" + "x" * 60])
def test_a_bar_has_room_for_the_time_that_is_left(columns, domain, clock, monkeypatch):
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    with progress_bar(Stages(about=domain, order=("fetch", "statistics"), tokens={"statistics": 12_000})) as progress:
        progress("statistics", 0, 12)
        clock[0] += 1
        progress("statistics", 1, 12)  # a block that was there already is no speed
        clock[0] += 21
        progress("statistics", 11, 12)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()).replace("\r", "\n")
    last = [line.rstrip() for line in plain.splitlines() if "statistics" in line][-1]
    assert len(last) <= columns
    assert "2 of 2: statistics " in last
    assert "11 of 12, 500 tokens/s" in last
    assert re.search(r" \d:\d\d:\d\d +(\d|-):..:..$", last), last
