"""What others wrote (names, authors, reasons, files) neither steers the terminal nor hides on it."""

from __future__ import annotations

import ast
import io
import logging
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import flows
from copal.errors import DataError
from copal.printable import printable, printable_lines
from flows.cli.output import hint, refuse, say
from flows.terminal.chain import render_history
from flows.terminal.lines import LogLines
from flows.terminal.progress import console, progress_bar
from support.histories import MOVED, a_history, altered, logged, with_gates

NASTY = (
    "\x1b[2J\x1b]0;gone\x07\x1b]8;;http://evil.example\x07\x9b31m\x00\x08\x7f\r\u202eexe.\u2066\u200f\u200b\ufeff"
    "\u2028\udcff[bold red]x[/] [link=http://evil.example]y[/link] :bomb: <script>alert(1)</script>"
)
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # rich's own


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def a_screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    """A terminal with colours in the place of standard output and standard error."""
    found = Screen()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, found)
    return found


@given(st.text())
def test_text_of_others_is_spelled_out_and_nothing_is_lost(text: str) -> None:
    assert printable(text).isprintable()
    assert printable_lines(text).replace("\n", "").replace("\t", "").isprintable()
    if text.isprintable():
        assert printable(text) == text


def test_lines_that_commands_print_are_fit_to_be_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = a_screen(monkeypatch)
    say(NASTY)
    hint(NASTY)
    refuse(NASTY)
    handler = logging.StreamHandler(screen)
    handler.setFormatter(LogLines("%(message)s"))
    handler.handle(logging.makeLogRecord({"msg": NASTY}))
    shown = screen.getvalue()
    assert OBEYED.findall(shown) == []
    assert shown.count("\\x1b[2J") == 4
    assert shown.count("\n") == 4


def test_whatever_rich_draws_is_fit_to_be_shown_and_in_colour_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = a_screen(monkeypatch)
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text
    from rich.tree import Tree

    table = Table(NASTY, title=NASTY, caption=NASTY)
    table.add_row(NASTY)
    table.add_row(Text(NASTY, "bold red"))
    tree = Tree(NASTY)
    tree.add(NASTY)
    console().print(Group(table, tree, Text(NASTY)), NASTY)
    shown = screen.getvalue()
    assert COLOUR.findall(shown), "it is drawn for a terminal"
    bare = COLOUR.sub("", shown)
    assert OBEYED.findall(bare) == []
    assert "[bold red]x[/]" in bare
    assert ":bomb:" in bare


def test_the_name_of_a_stage_is_fit_to_be_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = a_screen(monkeypatch)
    monkeypatch.setenv("COLUMNS", "400")  # the whole of it
    with progress_bar() as progress:
        progress(f"fetch {NASTY}", 1, 2)
    moves = re.compile(r"\x1b\[(?:\??[0-9;]*[a-zA-Z])|\r")  # rich's own: colours, and the cursor of the bar
    assert "\\x1b[2J" in screen.getvalue()
    assert OBEYED.findall(moves.sub("", screen.getvalue())) == []


def test_names_authors_and_reasons_of_a_lineage_are_fit_to_be_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = a_screen(monkeypatch)
    nasty = NASTY.replace("\udcff", "")  # a record is UTF-8
    step = {"add": nasty, "repository": nasty, "perplexity": {nasty: 7.0}, "aliases": [nasty]}
    history = altered(a_history([step], model=nasty), 2, signature=nasty)
    moved = MOVED.model_copy(update={"alias": nasty})
    history = logged(history, "promotion", "2026-03-01T00:00:00+00:00", to_version=2, why=nasty, details=moved)
    console().print(render_history(with_gates(history, 2, **{nasty: False})))
    bare = COLOUR.sub("", screen.getvalue())
    assert OBEYED.findall(bare) == []
    assert bare.count("\\x1b") >= 6


def test_an_error_is_fit_to_be_shown_wherever_it_goes() -> None:
    """A log of Prefect's holds its traceback."""
    assert OBEYED.findall(str(DataError(f"{NASTY}: cannot be read"))) == []
    assert str(DataError("line 1\nline 2")) == "line 1\nline 2"


def test_nothing_else_prints() -> None:
    """One place prints lines, one makes consoles; a few more write what no user of a workspace has named."""
    known = {
        "terminal/lines.py": {"print"},
        "terminal/progress.py": {"Console"},
        "step/launch.py": {"print"},  # the protocol between its processes, and what libraries say, made printable
        "step/node.py": {"print"},  # a line of ours, made printable
        "start/domains.py": {"print"},  # for this repository's own dvc.yaml
        "stack/alerts.py": {"print"},  # for administrators: names of ours, and errors, which are printable
        "stack/team.py": {"print"},
    }
    found: dict[str, set[str]] = {}
    root = Path(flows.__file__).parent
    for file in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            if name in ("print", "Console"):
                found.setdefault(file.relative_to(root).as_posix(), set()).add(name)
    assert found == known
