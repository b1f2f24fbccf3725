"""Which version serves: `copal gates`, `promote`, `rollback` and `export`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from flows.cli.context import CommandError, Folder, Json, Version, open_project
from flows.cli.output import say, show
from flows.terminal.progress import progress_bar, working

if TYPE_CHECKING:
    from flows.lineage.entries import Entry
    from flows.registry.registry import Registry

__all__ = ["export", "gates", "promote", "rollback"]

_Why = Annotated[str | None, Parameter(help="For the log.")]
_Force = Annotated[bool, Parameter(help="Against the gates, or after a move by hand; wants --why.")]


def gates(version: Version, /, *, again: bool = False, as_json: Json = False, workspace: Folder = ".") -> int:
    """Show what each gate said of a version.

    Args:
        again: Run them again, with the limits of today.
    """
    from flows.gates.champion import gates_entry
    from flows.project import read_log
    from flows.terminal.gates import render_gates

    project = open_project(workspace)
    registry = project.registry
    found = registry.resolve(version)
    if found.parent is None:
        raise CommandError(f"version {found.number} of {registry.model_name} is the dense base: it has no gates")
    if again:
        from flows.gates.run import run_gates

        with working("running the gates") as tell:
            run_gates(project, found, None, tell, again=True)
    entry = gates_entry(found, read_log(project))
    if entry is None:
        raise CommandError(
            f"version {found.number} of {registry.model_name} has not gone through its gates: "
            f"copal gates {found.number} --again"
        )
    show(entry, as_json, render_gates)
    return 0 if entry.details.passed else 1


def promote(version: Version, /, *, why: _Why = None, force: _Force = False, workspace: Folder = ".") -> int:
    """Make a version the champion: it passed its gates, and you want it to serve."""
    from flows.gates.champion import make_champion

    project = open_project(workspace)
    with working("looking at the version and its gates") as tell:
        found = project.registry.resolve(version)
        entry = make_champion(project, found.number, why=why, force=force, tell=tell)
    if entry is None:
        say(f"nothing to do: version {found.number} of {project.registry.model_name} is the champion")
    else:
        _say_moved(project.registry, entry)
    return 0


def rollback(*, why: _Why = None, force: _Force = False, workspace: Folder = ".") -> int:
    """Make the champion before this one the champion again."""
    from flows.gates.champion import restore_champion

    project = open_project(workspace)
    with working("looking at the champions before") as tell:
        entry = restore_champion(project, why=why, force=force, tell=tell)
    _say_moved(project.registry, entry)
    return 0


def export(version: Version, folder: Path, /, *, shard_size: str = "50GB", workspace: Folder = ".") -> int:
    """Copy a version's model to a new folder, plain Hugging Face format.

    Args:
        folder: The new folder.
        shard_size: The most weights in one file: 5GB, 500MB. A larger tensor has its own.
    """
    most = _bytes(shard_size)
    from flows.gates.champion import gates_entry
    from flows.models.card import gates_verdict
    from flows.models.export import export as copy
    from flows.project import read_log

    project = open_project(workspace)
    registry = project.registry
    with working("looking at the version and its gates"):
        found = registry.resolve(version)
        entry = gates_entry(found, read_log(project))
    gates = None if entry is None else entry.details
    verdict = gates_verdict(registry.record(found), gates)
    if verdict is not None:
        say(f"version {found.number} of {registry.model_name}: {verdict}")
    with progress_bar() as progress:
        copy(registry, found, gates, folder, most, progress)
    say(f"{folder}: version {found.number} of {registry.model_name}")
    return 0


def _bytes(text: str) -> int:
    """A size as transformers spells it, in bytes."""
    found = re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?) ?([KMGT])B", text.strip(), re.IGNORECASE)
    size = 0 if found is None else int(float(found[1]) * 1000 ** (1 + "KMGT".index(found[2].upper())))
    if not size:
        raise CommandError(f"--shard-size {text!r} is no size; write 5GB or 500MB (powers of ten)")
    return size


def _say_moved(registry: Registry, entry: Entry) -> None:
    before = "" if entry.from_version is None else f", before it version {entry.from_version}"
    say(f"champion of {registry.model_name}: version {entry.to_version}{before} (log entry {entry.number})")
