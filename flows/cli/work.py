"""Adapting a model to domains: `copal watch`, `adapt`, `status`, `plan`, `withdraw` and `gc`."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from flows.cli.context import CommandError, Folder, Json, open_project
from flows.cli.output import hint, print_json, say, show, show_versions
from flows.terminal.progress import working

if TYPE_CHECKING:
    from flows.registry.registry import Registry
    from flows.step.purge import Purged
    from flows.step.run import Withdrawal

__all__ = ["adapt", "gc", "plan", "status", "watch", "withdraw"]


def watch(
    *,
    once: bool = False,
    interval: Annotated[float | None, Parameter(validator=Number(gt=0, lt=math.inf))] = None,
    workspace: Folder = ".",
) -> int:
    """Adapt to every dataset version that the newest model version does not know.

    Args:
        once: One check; without it, check until interrupted.
        interval: Seconds between two checks; default: watch.interval.
    """
    from flows.cli.watching import changes_only, check, watch_forever

    project = open_project(workspace)
    place = project.place
    if once:
        check(place, say, lambda: working("comparing the watched branch with the newest version"))
        return 0
    tell = changes_only()
    hint(f"watching {place}; Ctrl-C ends it")
    watch_forever(lambda: check(place, tell), interval or project.settings.watch.interval, threading.Event())
    return 0


def adapt(domain: str, /, *, rev: str | None = None, workspace: Folder = ".") -> int:
    """Adapt to one dataset version.

    Args:
        domain: The folder under data/.
        rev: Git revision of its data; default: the watched branch.
    """
    from flows.runs.server import on_server
    from flows.step.resolve import find_step

    project = open_project(workspace)
    registry = project.registry
    with working("looking at the newest version"):
        known = find_step(project, domain, rev) is None
        head = registry.head()
    if known and head is not None and head.concluded:  # quick, without torch and Prefect
        _say_known(registry, domain)
        return 0
    with ExitStack() as stack:
        with working("starting"):
            if stack.enter_context(on_server()):
                from flows.adapt import adapt as flow

                take: Callable[[str, str, str | None], int | None] = flow
            else:
                from flows.by_hand import adapt as take
        number = take(project.place, domain, rev)
    registry.refresh()
    if number is None:
        _say_known(registry, domain)
    else:
        show_versions(project, [registry.version(number)], say)
    return 0


def status(
    version: Annotated[
        str | None, Parameter(help="Its domains one by one: a number, or an alias such as latest.")
    ] = None,
    /,
    *,
    every: Annotated[bool, Parameter(name="--all")] = False,
    as_json: Json = False,
    workspace: Folder = ".",
) -> int:
    """Show the versions, their figures, and what is pending.

    Args:
        every: Instead: every lineage of the registry.
    """
    from flows.terminal.status import render_lineages, render_scores, render_status

    project = open_project(workspace)
    if version is not None and every:
        raise CommandError("`copal status VERSION` is about one lineage: leave --all out")
    looking = working("reading the registry")
    if version is not None:
        from flows.lineage.scores import scores
        from flows.project import read_history

        with looking:
            rows = scores(read_history(project), version)
        show(rows, as_json, render_scores)
    elif every:
        from flows.pending.status import lineages

        with looking:
            found = lineages(project)
        show({"lineages": found}, as_json, lambda _: render_lineages(found, project.name))
    else:
        from flows.pending.status import status as ask

        with looking:
            state = ask(project)
        show(state, as_json, render_status)
    return 0


def plan(*, as_json: Json = False, workspace: Folder = ".") -> int:
    """Show what would run: in which order, how long, how large, and which settings count. Begins nothing."""
    from flows.pending.forecast import forecast
    from flows.terminal.forecast import render_forecast

    with working("looking at what is pending and what it takes"):
        found = forecast(open_project(workspace))
    show(found, as_json, render_forecast)
    return 0


def withdraw(domain: str, /, *, why: str, purge: bool = False, workspace: Folder = ".") -> int:
    """Make a version as if a domain had never been seen.

    Args:
        domain: A domain of the newest version.
        why: The reason; the log keeps it.
        purge: Also delete what is kept of its data; of one withdrawn earlier, too.
    """
    from flows.runs.server import on_server
    from flows.step.resolve import find_withdrawal

    project = open_project(workspace)
    registry = project.registry
    with working("looking at the newest version"):
        known = find_withdrawal(project, domain, why) is None
    if known:  # nothing to compute: quick, without torch and Prefect
        from flows.step.run import plain_tasks, run_withdrawal

        done = run_withdrawal(project, domain, why, plain_tasks(), purge=purge, tell=say)
    else:
        with ExitStack() as stack:
            with working("starting"):
                if stack.enter_context(on_server()):
                    from flows.withdraw import withdraw as flow

                    take: Callable[[str, str, str, bool], Withdrawal] = flow
                else:
                    from flows.by_hand import withdraw as take
            done = take(project.place, domain, why, purge)
    registry.refresh()
    if done.made is not None:
        show_versions(project, [registry.version(done.made.number)], say)
    elif not purge:
        head = registry.head()
        assert head is not None
        say(f"nothing to do: version {head.number} of {registry.model_name} is without {domain} already")
    if done.purged is not None:
        _say_purged(registry, done.purged)
    return 0


def gc(*, dry_run: bool = False, as_json: Json = False, workspace: Folder = ".") -> int:
    """Delete what can be made again: running sums of old versions, and what killed runs left.

    Args:
        dry_run: Only say what would go.
    """
    from flows.step.gc import collect

    project = open_project(workspace)
    with working("looking for what can be made again"):
        found = collect(project, dry_run=dry_run)
    if as_json:
        print_json({"dry_run": dry_run, "freed": [{"what": freed.what, "size": freed.size} for freed in found]})
        return 0
    for freed in found:
        say(f"{freed.what}: {freed.size / 1e6:.1f} MB")
    total = sum(freed.size for freed in found)
    say(f"{'would free' if dry_run else 'freed'} {total / 1e6:.1f} MB" if found else "nothing to free")
    return 0


def _say_known(registry: Registry, domain: str) -> None:
    head = registry.head()
    assert head is not None
    say(f"nothing to do: version {head.number} of {registry.model_name} knows {domain} at this data version")


def _say_purged(registry: Registry, purged: Purged) -> None:
    served = {version.number: version.aliases for version in registry.versions()}
    traces = [
        f"{number} ({', '.join(served[number])})" if served.get(number) else str(number) for number in purged.traces
    ]
    deleted = ", ".join(map(str, purged.deleted))
    say(
        f"purged {purged.domain}: its contribution (version {deleted}), every running sum with it and fetched copies "
        f"of its data are gone, {purged.size / 1e6:.1f} MB"
    )
    say(f"traces of {purged.domain} stay in the weights of version {', '.join(traces)}")
    say("the data itself is in the hands of git and DVC: delete it from the repository, its cache and its remote")
