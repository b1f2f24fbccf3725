"""What a command does itself where no Prefect server is named: what the flows of the same names do, without Prefect.

A server for one command alone takes longer to start than a small step, and nobody looks at it afterwards.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import tenacity

import copal.step  # noqa: F401 - torch and transformers, while the command says that it starts and not in silence later
from copal.errors import one_line
from flows.pending.take_up import take_up
from flows.project import open_project
from flows.runs.limit import time_limit
from flows.step.retries import PAUSES, may_pass
from flows.step.run import Tasks, Withdrawal, run_step, run_withdrawal
from flows.terminal.lines import write
from flows.terminal.progress import is_quiet
from flows.terminal.steps import shown_tasks

__all__ = ["adapt", "watch", "withdraw"]


def watch(workspace: str) -> list[int]:
    """Take the step to every pending dataset version: see `flows.pending.take_up`."""
    return take_up(workspace, adapt, _tasks().gates)


def adapt(workspace: str, domain: str, rev: str | None = None) -> int | None:
    """One step: see `flows.adapt.adapt`."""
    project = open_project(workspace)
    with time_limit(project.settings.run.time_limit):
        made = run_step(project, domain, rev, _tasks(), tell=write)
    return made.number if made else None


def withdraw(workspace: str, domain: str, why: str, purge: bool = False) -> Withdrawal:
    """A version as if a domain had never been seen: see `flows.withdraw.withdraw`."""
    project = open_project(workspace)
    with time_limit(project.settings.run.time_limit):
        return run_withdrawal(project, domain, why, _tasks(), purge=purge, tell=write)


def _tasks() -> Tasks:
    """The tasks of a step, tried again as `flows.runs.tasks` does it."""
    tasks = shown_tasks(write)
    tried_again = tenacity.retry(
        stop=tenacity.stop_after_attempt(1 + len(PAUSES)),
        wait=tenacity.wait_chain(*map(tenacity.wait_fixed, PAUSES)),
        retry=tenacity.retry_if_exception(may_pass),
        before_sleep=_tell_why,
        reraise=True,
    )
    return replace(
        tasks,
        inputs=tried_again(tasks.inputs),
        fetch=tried_again(tasks.fetch),
        register=tried_again(tasks.register),
        gates=tried_again(tasks.gates),
    )


def _tell_why(failed: tenacity.RetryCallState) -> None:
    """Say what failed before the pause: nobody should wait in silence."""
    assert failed.outcome is not None
    task, error = getattr(failed.fn, "__name__", "the task"), failed.outcome.exception()
    if isinstance(error, Exception) and not is_quiet():
        kind, pause = type(error).__name__, failed.upcoming_sleep
        write(f"{task} failed ({kind}: {one_line(error)}) and is tried again in {pause:.0f} s", sys.stderr)
