"""What made a version, and is it so: `copal lineage`, `plot`, `audit QUESTION`, `verify` and `replay`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter
from cyclopts.validators import mutually_exclusive

from flows.cli.context import CommandError, Folder, Json, Version, open_project
from flows.cli.output import print_json, say, show
from flows.terminal.progress import progress_bar, working

if TYPE_CHECKING:
    from flows.lineage.history import History

__all__ = ["data", "diff", "lineage", "plot", "replay", "used", "verify", "whose", "worse"]

_FORM = Group("Form", help="One of these, in place of a table.", validator=mutually_exclusive)


def lineage(
    version: Annotated[str | None, Parameter(help="The chain up to it: a number, or an alias such as latest.")] = None,
    /,
    *,
    as_json: Annotated[bool, Parameter(name="--json", group=_FORM, help="All of it, for programs.")] = False,
    html: Annotated[Path | None, Parameter(group=_FORM, help="Write a page that needs no network.")] = None,
    openlineage: Annotated[
        Path | None, Parameter(group=_FORM, help="Write OpenLineage run events, a line each.")
    ] = None,
    workspace: Folder = ".",
) -> int:
    """Show which data, settings and code made each version."""
    from copal.files import write_atomic
    from flows.lineage.history import up_to
    from flows.terminal.chain import render_history

    history = _history(workspace)
    if version is not None:
        history = up_to(history, version)
    file = html or openlineage
    if file is not None and (file.is_dir() or not file.parent.is_dir()):
        raise CommandError(f"{file} cannot be written; name a file in a folder that exists")
    if html is not None:
        from flows.lineage.page.page import render_page

        write_atomic(html, render_page(history))
        say(f"{html}: the lineage of {history.model}")
    elif openlineage is not None:
        import json

        from flows.lineage.openlineage import events

        found = events(history)
        write_atomic(openlineage, "".join(f"{json.dumps(event)}\n" for event in found))
        say(f"{openlineage}: {len(found)} events")
    else:
        show(history, as_json, render_history)
    return 0


def plot(
    version: Annotated[str, Parameter(help="The newest one to show: a number or an alias.")] = "latest",
    /,
    *,
    out: Annotated[Path, Parameter(help="The folder for the pictures; made where it is missing.")] = Path("pictures"),
    workspace: Folder = ".",
) -> int:
    """Draw perplexity by version and domain, forgetting, and what the step did to each layer: PNG and SVG files."""
    from flows.lineage.history import up_to
    from flows.lineage.pictures import draw_pictures

    if out.exists() and not out.is_dir():
        raise CommandError(f"{out} is a file; name a folder for the pictures")
    history = up_to(_history(workspace), version)
    with working("drawing"):
        out.mkdir(parents=True, exist_ok=True)
        files = draw_pictures(history, out)
    if not files:
        raise CommandError(f"version {version} of {history.model} is the dense base: there is nothing to draw yet")
    for file in files:
        say(str(file))
    return 0


def verify(
    version: Version,
    /,
    *,
    no_data: Annotated[bool, Parameter(help="Leave the data out: it is fetched and hashed.")] = False,
    as_json: Json = False,
    workspace: Folder = ".",
) -> int:
    """Check files, records, log, data and signature of a version: what differs."""
    from flows.verification.verify import verify as check

    project = open_project(workspace)
    registry = project.registry
    with working("reading every file of the version"):
        found = check(project, registry.resolve(version), data=not no_data)
    if as_json:
        print_json({"model": registry.model_name, **asdict(found)})
    else:
        for line in (*found.findings, *(f"not checked: {what}" for what in found.skipped)):
            say(line)
        said = f"{len(found.findings)} differences" if found.findings else "nothing differs"
        say(f"version {found.version} of {registry.model_name}: {said}; checked {', '.join(found.checked)}")
    return 1 if found.findings else 0


def replay(
    version: Version,
    /,
    *,
    last_step: bool = False,
    keep: Path | None = None,
    as_json: Json = False,
    workspace: Folder = ".",
) -> int:
    """Make a version again from its record, and compare masks and weights.

    Args:
        last_step: Only its own step, on the statistics that its parent's state holds.
        keep: A new folder for what is made; default: deleted.
    """
    from flows.verification.replay import replay as make_again

    project = open_project(workspace)
    registry = project.registry
    with progress_bar() as progress:
        found = make_again(project, registry.resolve(version), last_step=last_step, keep=keep, progress=progress)
    if as_json:
        print_json(found.as_dict())
    else:
        differ = f"{found.masks_differ:.4%} of mask bits differ, weights by {found.largest_difference:g} at most"
        said = "identical, masks and weights" if found.identical else differ
        say(f"version {found.version} of {registry.model_name}: {said}")
        for name, (then, now) in found.surroundings.items():
            say(f"{name}: {then} then, {now} now")
    return 0 if found.identical else 1


# --- copal audit: an auditor's questions


def used(dataset: str, /, *, as_json: Json = False, workspace: Folder = ".") -> int:
    """Which versions hold a dataset.

    Args:
        dataset: A domain, or an md5 of its data (8 digits or more).
    """
    from flows.lineage.answers import used as ask
    from flows.terminal.answers import render_answer

    show(ask(_history(workspace), dataset), as_json, render_answer)
    return 0


def data(*, alias: Version = "champion", on: str | None = None, as_json: Json = False, workspace: Folder = ".") -> int:
    """Which data is in a version.

    Args:
        on: As it was then: a day or a time in ISO 8601, UTC; default: now.
    """
    from flows.lineage.answers import data_in as ask
    from flows.terminal.answers import render_answer

    show(ask(_history(workspace), alias, on), as_json, render_answer)
    return 0


def diff(a: Version, b: Version, /, *, as_json: Json = False, workspace: Folder = ".") -> int:
    """What changed from one version to another."""
    from flows.lineage.answers import diff as ask
    from flows.terminal.answers import render_answer

    show(ask(_history(workspace), a, b), as_json, render_answer)
    return 0


def worse(domain: str | None = None, /, *, as_json: Json = False, workspace: Folder = ".") -> int:
    """Which domains got worse since they were the newest, when, and by which step.

    Args:
        domain: Only this one.
    """
    from flows.lineage.answers import worse as ask
    from flows.terminal.answers import render_answer

    show(ask(_history(workspace), domain), as_json, render_answer)
    return 0


def whose(folder: Path, /, *, as_json: Json = False, workspace: Folder = ".") -> int:
    """Which version a folder's files belong to.

    Args:
        folder: A version's folder, or an exported model.
    """
    from flows.lineage.answers import whose as ask
    from flows.models.shards import folder_files
    from flows.terminal.answers import render_answer

    folder = folder.expanduser().resolve()
    if not folder.is_dir():
        raise CommandError(f"{folder} is no folder; name a version's folder or an exported model")
    history = _history(workspace)
    with working("reading files"):
        files = folder_files(folder)
    show(ask(history, files), as_json, render_answer)
    return 0


def _history(workspace: str) -> History:
    from flows.project import read_history

    with working("reading the registry"):
        return read_history(open_project(workspace))
