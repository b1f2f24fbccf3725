"""The state of a workspace as a table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = [
    "render_lineages",
    "render_status",
    "waits",
]


def render_lineages(found: list[dict[str, Any]], own: str) -> RenderableType:
    """`lineages` for people: a row each; `own` is the lineage of the workspace."""
    from rich.table import Table

    if not found:
        return "no lineage in this registry yet: register a base with `copal init DIR --base SOURCE`"
    table = Table(title="lineages of the registry (*: of this workspace)", title_justify="left")
    for heading in ("model", "head", "domains", "aliases"):
        table.add_column(heading, justify="right" if heading == "head" else "left")
    for lineage in found:
        aliases = ", ".join(f"{alias}: {number}" for alias, number in sorted(lineage["aliases"].items()))
        mark = "*" if lineage["model"] == own else ""
        table.add_row(
            f"{lineage['model']}{mark}", str(lineage["head"]), ", ".join(lineage["domains"]) or "dense base", aliases
        )
    return table


def render_status(found: Mapping[str, Any]) -> RenderableType:
    """`status` for people: a table with a row a version and a column a domain, and below it what is pending.

    The row on top is the dense base, on the data of the newest version that knows a domain. Where an earlier version
    was measured on other data of that domain, or in another dtype, its figure has an asterisk: it does not compare with
    those below.
    """
    from rich.console import Group
    from rich.text import Text

    below = [
        f"version {version['version']} failed {gate}: {why}"
        for version in found["versions"][-1:]
        for gate, why in version["failed"].items()
    ]
    below += [f"pending: {entry['domain']} at {entry['dvc_md5'][:10]}" for entry in found["pending"]]
    below += [waits(entry) for entry in found["waiting"]]
    below += [
        f"refused: {entry['domain']} at {entry['dvc_md5'][:10]} since {entry['since']}: {entry['reason']}"
        for entry in found["refused"]
    ]
    below += [f"note: {note}" for note in found["notes"]]
    below += [f"problem: {problem}" for problem in found["problems"]]
    if not found["versions"]:
        below.insert(0, f"{found['model']} has no versions yet: register a base with `copal init DIR --base SOURCE`")
        return Group(*map(Text, below))
    return Group(_table(found["model"], found["versions"]), *map(Text, below))


def waits(entry: Mapping[str, Any]) -> str:
    """One line on an entry of `waiting`."""
    tries = "once" if entry["tries"] == 1 else f"{entry['tries']} times"
    return (
        f"waiting for data: {entry['domain']} at {entry['dvc_md5'][:10]}, looked for {tries} since {entry['since']}, "
        f"again at {entry['next_try']}; run `dvc push` where the data is"
    )


def _table(model: str, versions: list[Mapping[str, Any]]) -> RenderableType:
    from rich.table import Table

    dense: dict[str, float] = {}  # by the newest version that knows a domain; domains in the order they came
    for version in versions:
        fresh = sorted(version["dense_perplexity"], key=lambda domain: domain != version["domain"])
        dense |= {domain: version["dense_perplexity"][domain] for domain in fresh}
    table = Table(title=f"{model}: perplexity by domain", title_justify="left")
    table.add_column("version", justify="right")
    table.add_column("adapted to")
    for domain in dense:
        table.add_column(domain, justify="right")
    for heading in ("sparsity", "came back", "seconds"):
        table.add_column(heading, justify="right")
    table.add_column("gates")
    table.add_column("aliases")
    compares = True
    for version in versions:
        cells, same = _cells(version, dense)
        compares = compares and same
        table.add_row(
            str(version["version"]),
            _what(version),
            *cells,
            f"{version['sparsity']:.4f}",
            "" if version["weights_back"] is None else f"{version['weights_back']:,}",
            f"{sum(version['seconds'].values()):.0f}" if version["parent"] else "",
            version["gates"] or "",
            ", ".join(version["aliases"]),
            end_section=version["parent"] is None,
        )
    if not compares:
        table.caption = "* measured on other data of the domain, or in another dtype"
        table.caption_justify = "left"
    return table


def _what(version: Mapping[str, Any]) -> str:
    if version["withdrawn"]:
        return f"withdrew {version['withdrawn']}"
    return str(version["domain"] or "dense base")


def _cells(version: Mapping[str, Any], dense: Mapping[str, float]) -> tuple[list[str], bool]:
    """A version's cell for each domain, and whether all of them compare with the dense row."""
    if version["parent"] is None:
        return [f"{value:.2f}" for value in dense.values()], True
    cells, compares = [], True
    for domain, value in dense.items():
        if domain not in version["perplexity"]:
            cells.append("")
            continue
        # The dense model gives the same tokens in the same dtype the same figure.
        same = math.isclose(version["dense_perplexity"][domain], value, rel_tol=1e-6)
        compares = compares and same
        cells.append(f"{version['perplexity'][domain]:.2f}{'' if same else '*'}")
    return cells, compares
