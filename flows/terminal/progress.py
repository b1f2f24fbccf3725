"""What the terminal shows: results on standard output, progress on standard error."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from copal.progress import Progress, silent
from flows.terminal.lines import fit, write

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["QUIET", "console", "is_quiet", "progress_bar", "working"]

QUIET = "COPAL_QUIET"  # an environment variable: a flow may run in another thread or process than the command
_LONG = 2.0  # seconds after which a stage is worth a line in a log
_PIPE_WIDTH = 160  # columns where there is no terminal to ask: tables are cut nowhere


def console(*, stderr: bool = False) -> Console:
    """Standard output, or standard error; plain text where it is not a terminal. What it draws is fit to be shown."""
    from rich.console import Console

    from flows.terminal.drawing import Fitting

    there = (sys.stderr if stderr else sys.stdout).isatty()
    # Without markup: [brackets] are somebody's text, and no style.
    found = Console(stderr=stderr, highlight=False, markup=False, emoji=False, width=None if there else _PIPE_WIDTH)
    found.push_render_hook(Fitting())
    return found


def is_quiet() -> bool:
    """Whether the user wants results only."""
    return bool(os.environ.get(QUIET))


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show on a terminal that work goes on, where nobody knows how long it takes."""
    if is_quiet() or not sys.stdout.isatty():
        yield
    else:
        with console().status(what):
            yield


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A callback that shows a bar for each stage on standard error; where that is no terminal, a line or two.

    Shows nothing where the user wants results only.
    """
    if is_quiet():
        yield silent
        return
    if not sys.stderr.isatty():
        yield _plain(sys.stderr)
        return
    from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn()
    tasks: dict[str, TaskID] = {}
    reached: dict[str, int] = {}
    with Bars(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console(stderr=True)) as bars:

        def report(stage: str, done: int, total: int) -> None:
            # A total of 1 says only that something began or ended: the bar swings until then.
            whole = None if total == 1 and done < total else total
            if stage not in tasks:
                tasks[stage] = bars.add_task(fit(stage), total=whole)  # bars are drawn past the hook
            elif done < reached[stage]:  # the same stage again, for instance another model is evaluated
                bars.reset(tasks[stage], total=whole)
            reached[stage] = done
            bars.update(tasks[stage], completed=done, total=whole)

        yield report


def _plain(stream: TextIO) -> Progress:
    began: dict[str, float] = {}
    reached: dict[str, int] = {}
    told: set[str] = set()

    def report(stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage not in began or done < reached[stage]:
            began[stage] = now
            told.discard(stage)
        reached[stage] = done
        seconds = now - began[stage]
        if seconds < _LONG:
            return
        share = f"{100 * done // max(total, 1)}%"
        if done >= total:
            write(f"{stage}: {share}, {seconds:.0f} s", stream)
        elif stage not in told:
            told.add(stage)
            write(f"{stage}: {share}", stream)

    return report
