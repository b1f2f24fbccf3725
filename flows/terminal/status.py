"""The state of a workspace as a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flows.lineage.figures import figure, four_digits, percent, short, timespan
from flows.terminal.tables import plain_table

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

__all__ = [
    "held_back",
    "render_lineages",
    "render_scores",
    "render_status",
    "waits",
]

_NEWEST = 20  # versions in the table: what matters today fits on a screen


def render_lineages(found: list[dict[str, Any]], own: str) -> RenderableType:
    """`lineages` for people: a row each; `own` is the lineage of the workspace."""
    if not found:
        return "no lineage in this registry yet: register a base with `copal init DIR --base SOURCE`"
    title = "lineages of the registry (*: of this workspace)"
    table = plain_table(title, "model", "head", "domains", "aliases", right=("head",))
    for lineage in found:
        aliases = ", ".join(f"{alias}: {number}" for alias, number in sorted(lineage["aliases"].items()))
        mark = "*" if lineage["model"] == own else ""
        table.add_row(
            f"{lineage['model']}{mark}", str(lineage["head"]), ", ".join(lineage["domains"]) or "dense base", aliases
        )
    return table


def render_status(found: Mapping[str, Any]) -> RenderableType:
    """`status` for people: the newest versions, a row each, and below them what is to be done.

    `mean`: the geometric mean of a version's perplexities; `x dense`: how many times the dense base's that is.
    """
    from rich.console import Group
    from rich.text import Text

    below = [
        f"version {version['version']} failed {gate}: {why}"
        for version in found["versions"][-1:]
        for gate, why in version["failed"].items()
    ]
    older = len(found["versions"]) - _NEWEST
    if older > 0:
        below.insert(0, f"{older} older: `copal lineage` shows all of them, `copal status VERSION` the domains of one")
    pending = found["pending"]
    below += [f"pending: {entry['domain']} at {short(entry['dvc_md5'])}" for entry in pending]
    if pending:
        below.append("next: `copal watch --once` takes what is pending, `copal plan` says how long that takes")
    below += held_back(found)
    if not found["versions"]:
        below.insert(0, f"{found['model']} has no versions yet: register a base with `copal init DIR --base SOURCE`")
        return Group(*map(Text, below))
    return Group(_versions(found["model"], found["versions"]), *map(Text, below))


def render_scores(found: Mapping[str, Any]) -> RenderableType:
    """`flows.lineage.scores.scores` for people: a row for each domain, the one furthest from the dense base first."""
    from rich.console import Group
    from rich.text import Text

    told = f"version {found['version']} of {found['model']}: {found['step']}, sparsity {found['sparsity']:.4f}"
    if found["parent"]:
        told += f", {timespan(sum(found['seconds'].values()))}"
    if found["weights_back"] is not None:
        told += f", {found['weights_back']:,} weights came back"
    lines = [f"gate {gate} failed: {why}" for gate, why in found["failed"].items()]
    if not found["domains"]:
        return Group(*map(Text, (told, *lines)))
    numbers = ("from", "perplexity", "dense", "x dense", "when newest", "change")
    table = plain_table(None, "domain", *numbers, right=numbers)
    for one in found["domains"]:
        table.add_row(
            one["domain"],
            f"v{one['came_in']}",
            figure(one["perplexity"]),
            figure(one["dense_perplexity"]),
            figure(one["times_dense"]),
            figure(one["when_newest"], nothing=""),
            "" if one["change"] is None or one["came_in"] == found["version"] else percent(one["change"]),
        )
    if len(found["domains"]) > 1:
        table.add_section()
        mean, dense, ratio = (found[name] for name in ("geometric_mean", "dense_geometric_mean", "times_dense"))
        table.add_row("geometric mean", "", figure(mean), figure(dense), figure(ratio), "", "")
    return Group(Text(told), table, *_tasks(found["tasks"]), *map(Text, lines))


def waits(entry: Mapping[str, Any]) -> str:
    """One line on an entry of `waiting`."""
    tries = "once" if entry["tries"] == 1 else f"{entry['tries']} times"
    return (
        f"waiting for data: {entry['domain']} at {entry['dvc_md5'][:10]}, looked for {tries} since {entry['since']}, "
        f"again at {entry['next_try']}; run `dvc push` where the data is"
    )


def held_back(found: Mapping[str, Any]) -> Iterator[str]:
    """`flows.pending.status.held_back` for people: a line for each thing that would not run, for notes and problems."""
    yield from (waits(entry) for entry in found["waiting"])
    yield from (_refused(entry) for entry in found["refused"])
    yield from (f"note: {note}" for note in found["notes"])
    yield from (f"problem: {problem}" for problem in found["problems"])


def _refused(entry: Mapping[str, Any]) -> str:
    return (
        f"refused: {entry['domain']} at {short(entry['dvc_md5'])} since {entry['since']}: {entry['reason']}; mend the "
        f"data and commit it again, or try once more as it is: `copal adapt {entry['domain']}`"
    )


def _tasks(rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    """What the tasks of domains gave, a row for each metric; nothing where there are none."""
    if not rows:
        return []
    numbers = ("questions", "this version", "dense")
    table = plain_table(None, "domain", "task", "metric", *numbers, right=numbers)
    for row in rows:
        named = (row["domain"], row["task"], row["metric"], str(row["documents"]))
        table.add_row(*named, four_digits(row["figure"]), four_digits(row["dense"]))
    return [table]


def _versions(model: str, versions: Sequence[Mapping[str, Any]]) -> Table:
    title = f"{model}: {len(versions)} version{'s' if len(versions) > 1 else ''}, the newest first"
    headings = ("v", "adapted to", "mean", "x dense", "worst domain", "gates", "aliases")
    table = plain_table(title, *headings, right=("v", "mean", "x dense"))
    for version in versions[: -_NEWEST - 1 : -1]:
        worst = version["worst"]
        table.add_row(
            str(version["version"]),
            _what(version),
            figure(version["geometric_mean"], nothing=""),
            figure(version["times_dense"], nothing=""),
            f"{worst['times_dense']:.2f} {worst['domain']}" if worst else "",
            version["gates"] or "",
            "\n".join(alias for alias in version["aliases"] if alias != "latest"),  # that is the first row
        )
    return table


def _what(version: Mapping[str, Any]) -> str:
    if version["withdrawn"]:
        return f"withdrew {version['withdrawn']}"
    return str(version["domain"] or "dense base")
