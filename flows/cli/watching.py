"""The watcher of the command line: one check, and checks for ever."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import TYPE_CHECKING

from copal.errors import CopalError
from flows.cli.context import CommandError, open_project
from flows.cli.output import refuse, say, show_versions
from flows.terminal.progress import is_quiet, working

if TYPE_CHECKING:
    from flows.pending.missing_data import Waiting
    from flows.pending.plan import Plan
    from flows.project import Project

__all__ = ["changes_only", "check", "watch_forever"]

_logger = logging.getLogger(__name__)


def watch_forever(check: Callable[[], None], interval: float, stop: threading.Event) -> None:
    """Call `check`, wait `interval` seconds, and again, until `stop` is set. A check that fails is not the last one."""
    said = None
    while not stop.is_set():
        try:
            check()
            said = None
        except CopalError as error:
            if str(error) != said:  # what keeps failing is said once
                said = str(error)
                refuse(said)
        except Exception:
            # A bug, or a library that gave up on a network: a watcher left alone must outlive both.
            _logger.exception("the check failed; the next one is in %g s", interval)
        stop.wait(interval)


def changes_only() -> Callable[[str], None]:
    """A `say` that says a thing again only after something else."""
    said: list[str] = []

    def tell(text: str) -> None:
        if said != [text]:
            said[:] = [text]
            say(text)

    return tell


def check(
    place: str, tell: Callable[[str], None], looking: Callable[[], AbstractContextManager[object]] = nullcontext
) -> None:
    """One check of a watcher: run what is pending, in order. Neither Prefect nor torch is loaded where nothing is.

    Args:
        looking: what to be in while it looks for what is pending.

    Raises:
        CopalError: a dataset is refused, or there is no base model; what else was pending has been run.
    """
    from flows.pending.plan import plan, refusal_text

    project = open_project(place)  # anew for each check: params.yaml may have changed
    with looking():
        found = plan(project)
    if not found.pending and (found.head is None or found.head.concluded):
        lines = _waits({version.domain: wait for version, wait in found.waiting}) or _nothing_new(project, found)
        tell("\n".join([*(f"note: {note}" for note in found.notes), *lines]))
        problems = [*found.problems, *(refusal_text(*each) for each in found.refused)]
        if problems:
            raise CommandError("; ".join(problems))
        return
    if found.head is None:
        raise CommandError(f"{project.name} has no base model yet: run `copal init {place} --base SOURCE` first")
    for note in found.notes:
        tell(f"note: {note}")
    if not is_quiet():
        tell(_pending(found))
    _run(project, found.head.number, tell)


def _run(project: Project, newest: int, tell: Callable[[str], None]) -> None:
    from flows.pending.missing_data import waiting
    from flows.runs.server import on_server

    with ExitStack() as stack:
        with working("starting"):
            if stack.enter_context(on_server()):
                from flows.watch import watch as flow  # without torch: a worker takes the steps

                run: Callable[[str], list[int]] = flow
            else:
                from flows.by_hand import watch as run
        try:
            run(project.place)
        finally:  # one dataset may have been refused and others not
            project.registry.refresh()
            made = [version for version in project.registry.versions() if version.number > newest]
            if made:
                show_versions(project, made, tell)
            elif waits := _waits(waiting(project.workspace, project.name)):
                tell("\n".join(waits))


def _pending(found: Plan) -> str:
    assert found.head is not None
    if not found.pending:
        return f"the gates of version {found.head.number} have not run yet"
    return "pending: " + ", ".join(f"{version.domain} at {version.md5[:10]}" for version in found.pending)


def _waits(missing: Mapping[str, Waiting]) -> list[str]:
    from flows.terminal.status import waits

    return [waits({"domain": domain} | missing[domain].as_dict()) for domain in sorted(missing)]


def _nothing_new(project: Project, found: Plan) -> list[str]:
    name = project.name
    if found.head is None:
        return [f"nothing new: no domain is tracked under data/, and {name} has no base model yet"]
    version = f"version {found.head.number} of {name}"
    domains = [domain.name for domain in project.registry.record(found.head).domains]
    if not domains:
        return [f"nothing new: {version} is the dense base, no domain is tracked under data/"]
    return [f"nothing new: {version} knows {', '.join(domains)} at their newest data versions"]
