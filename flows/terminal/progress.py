"""What the terminal shows: results on standard output; progress on standard error, and while nobody knows how long it
takes, as a spinner where the result will be."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TextIO

from copal.progress import Progress, silent
from flows.lineage.figures import gigabytes, timespan
from flows.terminal.lines import fit, write

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["QUIET", "Stages", "console", "is_quiet", "progress_bar", "working"]

QUIET = "COPAL_QUIET"  # an environment variable: a flow may run in another thread or process than the command
_LONG = 2.0  # seconds after which a stage is worth a line in a log
_EVERY = 30.0  # seconds between two of them
_BYTES = 100_000  # a stage with more parts counts bytes: a percentage says more
_NARROW = 100  # columns of a terminal below which the view of a stage leaves the memory out, for the time that is left
# A view would put something of its own in the place of sys.stdout, and libraries that are imported meanwhile keep it:
# DVC resets colours as the process ends, which then was shown as text. So what is told meanwhile goes through the view
# (`working`), or waits until it is gone (`flows.terminal.steps`).
_LEFT_ALONE = False
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
def working(what: str) -> Iterator[Callable[[str], None]]:
    """Show that work goes on, where nobody knows how long: on a terminal at once, else in a line after two seconds.

    Gives what prints a line meanwhile.
    """
    if is_quiet():
        yield write
    elif sys.stdout.isatty():
        from rich.live import Live
        from rich.spinner import Spinner

        shown = console()
        spinner = Spinner("dots", what, style="status.spinner")
        with Live(spinner, console=shown, transient=True, redirect_stdout=_LEFT_ALONE):
            yield lambda line: shown.print(fit(line), soft_wrap=True)
    else:
        with _plain(sys.stderr, Stages()) as report:
            report(what, 0, 1)
            yield write


@dataclass(frozen=True, kw_only=True, slots=True)
class Stages:
    """What is known of a work before it begins.

    Attributes:
        about: what it is done for.
        order: its stages; one that is not among them has no number.
        tokens: stage -> how many tokens go through the model in it, where that can be said.
    """

    about: str = ""
    order: tuple[str, ...] = ()
    tokens: Mapping[str, int] = field(default_factory=dict)

    def label(self, stage: str) -> str:
        """As `code, 2 of 6: statistics`."""
        number = f"{self.order.index(stage) + 1} of {len(self.order)}" if stage in self.order else ""
        before = ", ".join(filter(None, (self.about, number)))
        return f"{before}: {stage}" if before else stage


@contextmanager
def progress_bar(stages: Stages | None = None) -> Iterator[Progress]:
    """A callback that shows a bar for each stage on standard error; where that is no terminal, a line when it has taken
    two seconds, one every half minute, and one at its end.

    Shows nothing where the user wants results only.
    """
    stages = stages or Stages()
    if is_quiet():
        yield silent
    elif sys.stderr.isatty():
        with _bars(stages) as report:
            yield report
    else:
        with _plain(sys.stderr, stages) as report:
            yield report


@contextmanager
def _bars(stages: Stages) -> Iterator[Progress]:
    from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    shown = console(stderr=True)
    narrow = shown.width < _NARROW
    room = max(shown.width - (50 if narrow else 75), 10)  # beside the bar, what is counted, and the times
    described = TextColumn("{task.description}", markup=False)
    counted = TextColumn("{task.fields[counted]}", markup=False)
    tasks: dict[str, TaskID] = {}
    reached: dict[str, int] = {}
    began: dict[str, float] = {}
    columns = (described, BarColumn(8 if narrow else 16), counted, TimeElapsedColumn(), TimeRemainingColumn())
    with Bars(*columns, console=shown, redirect_stdout=_LEFT_ALONE) as bars:

        def report(stage: str, done: int, total: int) -> None:
            # A total of 1 says only that something began or ended: the bar swings until then.
            whole = None if total == 1 and done < total else total
            if stage not in tasks:  # bars are drawn past the hook
                label = fit(stages.label(stage))
                label = label if len(label) <= room else f"…{label[1 - room :]}"  # its end says which stage it is
                tasks[stage] = bars.add_task(label, total=whole, counted="")
                began[stage] = time.monotonic()
            elif done < reached[stage]:  # the same stage again, for instance another model is evaluated
                bars.reset(tasks[stage], total=whole)
                began[stage] = time.monotonic()
            reached[stage] = done
            counted = _counted(stages, stage, done, total, time.monotonic() - began[stage], memory=not narrow)
            bars.update(tasks[stage], completed=done, total=whole, counted=", ".join(counted))

        yield report


@contextmanager
def _plain(stream: TextIO, stages: Stages) -> Iterator[Progress]:
    lines = _Lines(stream, stages)
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(min(_LONG / 4, _EVERY)):
            lines.tick()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lines.report
    finally:
        ended.set()
        thread.join()


class _Lines:
    """Lines on the stage that is under way. A thread asks for them: a library may be silent for minutes."""

    def __init__(self, stream: TextIO, stages: Stages) -> None:
        self._stream, self._stages = stream, stages
        self._lock = threading.Lock()
        self._now: tuple[str, int, int] | None = None
        self._began = self._told = 0.0

    def report(self, stage: str, done: int, total: int) -> None:
        with self._lock:
            now = time.monotonic()
            if self._now is None or stage != self._now[0] or done < self._now[1]:
                self._began = self._told = now
            self._now = stage, done, total
            if done >= total and now - self._began >= _LONG:
                write(f"{self._stages.label(stage)}: {timespan(now - self._began)}", self._stream)
            else:
                self._tell(now)
            if done >= total:
                self._now = None

    def tick(self) -> None:
        with self._lock:
            self._tell(time.monotonic())

    def _tell(self, now: float) -> None:
        first = self._told == self._began
        if self._now is None or now - self._told < (_LONG if first else _EVERY):
            return
        self._told = now
        stage, done, total = self._now
        parts = _counted(self._stages, stage, done, total, now - self._began)
        if 0 < done < total:
            parts.append(f"{timespan((now - self._began) * (total - done) / done)} left")
        said = ", ".join(parts) or timespan(now - self._began)
        write(f"{self._stages.label(stage)}: {said}", self._stream)


def _counted(stages: Stages, stage: str, done: int, total: int, seconds: float, *, memory: bool = True) -> list[str]:
    """What can be said of a stage besides its time."""
    parts = []
    if total > 1:
        parts.append(f"{done:,} of {total:,}" if total < _BYTES else f"{100 * done // total}%")
    if done and seconds >= 1 and stage in stages.tokens:  # the first blocks may have been done before
        parts.append(f"{stages.tokens[stage] * done / total / seconds:,.0f} tokens/s")
    if memory and stage in stages.order:
        from flows.machine import memory_used  # brings the settings, which help can do without

        parts.append(f"{gigabytes(memory_used())} of memory")
    return parts
