"""What a workspace knows: the versions of its lineage, their figures, and what is pending."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flows.settings import Settings, Workspace

if TYPE_CHECKING:
    from rich.console import RenderableType

    from flows.datasets import DatasetVersion
    from flows.registry import ModelVersion

__all__ = ["lineages", "render", "render_lineages", "status", "waits"]


def status(workspace: Workspace, settings: Settings) -> dict[str, Any]:
    """The state of a workspace as plain JSON values.

    `model`: the name of the lineage. `versions`, oldest first, each with version, parent, domain, dvc_md5, git_rev
    (these three None at the root, and where it withdrew a domain), withdrawn (that domain, or None), sparsity (zeros as
    counted, a share), weights_back (None where the parent is dense), perplexity and dense_perplexity ({domain: value}),
    seconds ({statistics, solve, evaluate}), gates (passed or failed; None where they never ran), failed ({gate: why})
    and aliases. `pending`, in the order in which the watcher would take them, each with domain, dvc_md5 and git_rev.
    `waiting` for data that nobody has pushed, the same with tries, since and next_try. `notes` and `problems`: see
    `flows.reconcile.Plan`.

    Raises:
        DatasetError: the repository cannot be read.
        RegistryError: the registry cannot be read.
        LineageError: a version's record is damaged, or the log was altered.
    """
    from flows.reconcile import plan
    from flows.registry import open_registry

    registry = open_registry(workspace, settings)
    found = plan(workspace, settings, registry)
    entries = registry.log()
    return {
        "model": settings.model.name,
        "versions": [_version(version, registry.record(version), entries) for version in registry.versions()],
        "pending": [_dataset(version) for version in found.pending],
        "waiting": [_dataset(version) | wait.as_dict() for version, wait in found.waiting],
        "notes": list(found.notes),
        "problems": list(found.problems),
    }


def lineages(workspace: Workspace, settings: Settings) -> list[dict[str, Any]]:
    """Every lineage of the registry as plain JSON values, by name.

    Each with model, head and versions (numbers), domains (of the head, by name) and aliases ({alias: number}).

    Raises:
        RegistryError: the registry cannot be read.
        LineageError: the record of a head is damaged.
    """
    from flows.registry import open_registry

    found = []
    for registry in open_registry(workspace, settings).lineages():
        versions = registry.versions()
        head = versions[-1]
        found.append(
            {
                "model": registry.model_name,
                "head": head.number,
                "versions": [version.number for version in versions],
                "domains": [domain["name"] for domain in registry.record(head)["domains"]],
                "aliases": {alias: version.number for version in versions for alias in version.aliases},
            }
        )
    return found


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


def _dataset(version: DatasetVersion) -> dict[str, Any]:
    return {"domain": version.domain, "dvc_md5": version.md5, "git_rev": version.git_rev}


def _version(version: ModelVersion, record: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    from flows.aliases import gates_entry

    step = record["step"] or {}
    entry = gates_entry(version, entries)
    gates = entry["details"]["gates"] if entry else []
    return {
        "version": version.number,
        "parent": version.parent,
        "domain": step.get("name"),
        "dvc_md5": step.get("dvc_md5"),
        "git_rev": step.get("git_rev"),
        "withdrawn": version.withdrawn,
        "sparsity": record["sparsity"]["counted"],
        "weights_back": record["weights_back"],
        "perplexity": record["perplexity"],
        "dense_perplexity": record["dense_perplexity"],
        "seconds": record["seconds"],
        "gates": version.gates,
        "failed": {gate["name"]: gate["detail"] for gate in gates if not gate["passed"]},
        "aliases": list(version.aliases),
    }


def render(found: Mapping[str, Any]) -> RenderableType:
    """`status` for people: a table with a row a version and a column a domain, and below it what is pending.

    The row on top is the dense base, on the data of the newest version that knows a domain. Where an earlier version
    was measured on other data of that domain, its figure has an asterisk: it does not compare with those below.
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
        table.caption = "* measured on another version of the domain's data"
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
        # The dense model gives the same tokens the same figure: another figure was measured on other data.
        same = math.isclose(version["dense_perplexity"][domain], value, rel_tol=1e-6)
        compares = compares and same
        cells.append(f"{version['perplexity'][domain]:.2f}{'' if same else '*'}")
    return cells, compares
