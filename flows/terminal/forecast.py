"""What would run, as a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from flows.lineage.figures import gigabytes, timespan
from flows.terminal.status import held_back
from flows.terminal.tables import plain_table

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

__all__ = ["added_lines", "render_forecast"]

_KINDS = {"disk": "disk", "memory": "memory", "gpu": "GPU memory"}


def render_forecast(found: Mapping[str, Any]) -> RenderableType:
    """`flows.pending.forecast.forecast` for people: a table of the steps, one of the settings, and lines."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = []
    if found["gates"]:
        parts.append(Text(f"first: the gates of version {found['head']}, which have not run yet"))
    if found["steps"]:
        parts += [_steps(found), Text(f"times rest on {found['timed_by']}")]
    if found["settings"]:
        parts.append(_settings(found))
    return Group(*parts, *map(Text, _lines(found)))


def added_lines(added: Mapping[str, Any], forecast: Mapping[str, Any]) -> Iterator[str]:
    """What was added, as `flows.start.add.Added` tells it, and what the step to it takes."""
    for domain in added["brought_back"]:
        yield f"data/{domain} is there again: a `copal add` that was killed had moved it away"
    documents, windows = added["documents"], added["windows"]
    sides = ", ".join(
        f"{documents[side]:,} {what} ({windows[side]} windows)"
        for side, what in (("calibration", "calibrate"), ("evaluation", "evaluate"))
    )
    files = "1 file" if added["files"] == 1 else f"{added['files']:,} files"
    yield (
        f"data/{added['domain']}: {sum(documents.values()):,} documents in {files}, {gigabytes(added['size'])}; {sides}"
    )
    if repeated := added["repeated"]:
        more, repeats = ("1 more document", "repeats") if repeated == 1 else (f"{repeated:,} more documents", "repeat")
        yield f"{more} {repeats} the text of another one, which counts once"
    if added["left_out"]:
        yield f"{added['left_out']:,} are left out: other domains have their text on the other side"
    if added["unchecked"]:
        yield f"not held against {', '.join(added['unchecked'])}, whose data is not at hand: `dvc pull` brings it"
    yield f"committed as {added['commit'][:10]}: data/{added['domain']}.dvc"
    for step in forecast["steps"]:
        if step["domain"] == added["domain"]:
            time, size = sum(step["seconds"].values()), step["disk"]["version"]
            yield f"version {step['version']} will take about {timespan(time)}, and {gigabytes(size)} stay on disk"
            if step["refused"]:
                yield f"it would be refused: {step['refused']}"


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    if found["head"] is None:
        yield f"{found['model']} has no versions yet: register a base with `copal init DIR --base SOURCE`"
    elif not found["steps"] and not found["gates"]:
        known = "" if found["waiting"] or found["refused"] else f": version {found['head']} knows what is there"
        yield f"nothing would run{known}"
    yield from (_asks(step) for step in found["steps"][:1] if step["tasks"])
    yield from (
        f"version {step['version']} would be refused: {step['refused']}" for step in found["steps"] if step["refused"]
    )
    yield from held_back(found)


def _asks(step: Mapping[str, Any]) -> str:
    tasks = "1 task" if step["tasks"] == 1 else f"{step['tasks']} tasks"
    return f"version {step['version']} would be asked {tasks} of its domains"


def _steps(found: Mapping[str, Any]) -> Table:
    needs = list(found["steps"][0]["needed"])
    table = plain_table(
        f"{found['model']}: what would run, in this order",
        *("version", "adapts to", "at", "domains", "time", "stays on disk"),
        *(f"{_KINDS[what]} needed (free)" for what in needs),
        right=("version", "domains", "time"),
    )
    for step in found["steps"]:
        table.add_row(
            str(step["version"]),
            f"{step['domain']}{', new data' if step['replaces'] else ''}",
            step["dvc_md5"][:10],
            str(step["domains"]),
            timespan(sum(step["seconds"].values())),
            gigabytes(step["disk"]["version"]),
            *(f"{gigabytes(step['needed'][what])} ({gigabytes(step['free'][what])})" for what in needs),
        )
    if len(found["steps"]) > 1:
        table.add_section()
        time = sum(sum(step["seconds"].values()) for step in found["steps"])
        size = sum(step["disk"]["version"] for step in found["steps"])
        table.add_row("", "all", "", "", timespan(time), gigabytes(size), *("" for _ in needs))
    return table


def _settings(found: Mapping[str, Any]) -> Table:
    title = f"settings that differ from those of version {found['head']}"
    table = plain_table(title, "setting", "then", "now", "what it takes")
    for change in found["settings"]:
        table.add_row(change["name"], str(change["then"]), str(change["now"]), change["takes"])
    return table
