"""What MLflow says of a version on its page, as Markdown: figures, gates, data. Pure: knows no registry."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flows.lineage.entries import GatesEntry
from flows.lineage.figures import markdown_cell, markdown_table
from flows.lineage.record import Record

__all__ = ["LONGEST", "model_description", "run_title", "version_description"]

LONGEST = 5000  # characters: the columns of MLflow's database take no more
_HEADS = ("domain", "perplexity", "dense", "times dense", "DVC md5 of the data", "git revision")


def run_title(number: int | None, domain: str | None, withdrawn: str | None) -> str:
    """The name of the run that makes a version: `version 4: adapt legal`; without the number before there is one.

    Args:
        domain: that the version adapted to; None: it withdrew `withdrawn`, or is the dense base.
    """
    what = f"adapt {domain}" if domain else f"withdraw {withdrawn}" if withdrawn else "base"
    return what if number is None else f"version {number}: {what}"


def model_description(name: str, base: str) -> str:
    """One paragraph on a registered model.

    Args:
        base: source of the base model, see `flows.models.base.BaseModel`.
    """
    return (
        f"The lineage of {markdown_cell(name)}, kept by copal: version 1 is the dense base ({_source(base)}), "
        "each later one "
        "is that base pruned, without retraining, for the domains met so far. `latest` is the newest version, "
        "`challenger` the newest that passed its gates, and `champion` the one to serve. Move `champion` with `copal "
        "promote`, so that the log of the lineage tells of it."
    )


def version_description(number: int | None, record: Record, gates: GatesEntry | None) -> str:
    """The description of a version, at most `LONGEST` characters.

    Args:
        number: None before it has one.
        gates: the log entry with the results of its gates; None: they did not run yet.
    """
    title = f"## {markdown_cell(record.model)}{'' if number is None else f', version {number}'}"
    before = [title, _what(record), *_sparsity(record)]
    after = [*([] if record.parent is None else [_gates(gates)]), _where(number)]
    rows = _rows(record)
    room = LONGEST - sum(len(part) + 2 for part in (*before, *after))
    return "\n\n".join([*before, *_figures(record, rows, room), *after])


def _what(record: Record) -> str:
    if record.parent is None:
        return f"The dense base of the lineage, from {_source(record.base.source)}. Nothing in it is pruned."
    parent = record.parent.version
    if record.step is not None:
        return f"Version {parent} adapted to **{markdown_cell(record.step.name)}**."
    gone = record.withdraws
    assert gone is not None  # else there is a step
    data = markdown_cell(gone.dvc_md5)
    return f"Version {parent} without **{markdown_cell(gone.name)}** (data `{data}`), which was withdrawn."


def _sparsity(record: Record) -> list[str]:
    if record.parent is None:
        return []
    target, counted = record.sparsity.target, record.sparsity.counted
    wanted = target if isinstance(target, str) else f"{target:.4g} of each row"
    back = record.weights_back
    returned = "" if back is None else f"; {back:,} weights that were zero in its parent are not any more"
    return [f"Sparsity as counted: **{counted:.2%}** (wanted: {wanted}){returned}."]


def _rows(record: Record) -> list[tuple[str, ...]]:
    """A row a domain, that of the step first."""
    newest = record.step and record.step.name
    rows: list[tuple[str, ...]] = []
    for domain in sorted(record.domains, key=lambda domain: (domain.name != newest, domain.name)):
        name = domain.name
        perplexity, dense = record.perplexity.get(name), record.dense_perplexity.get(name)
        figures = ("-", "-", "-")
        if perplexity is not None and dense is not None:
            figures = (f"{perplexity:.2f}", f"{dense:.2f}", f"{perplexity / dense:.3f}")
        shown = f"**{markdown_cell(name)}**" if name == newest else markdown_cell(name)
        rows.append((shown, *figures, f"`{markdown_cell(domain.dvc_md5)}`", f"`{markdown_cell(domain.git_rev[:12])}`"))
    return rows


def _figures(record: Record, rows: Sequence[tuple[str, ...]], room: int) -> list[str]:
    """The table of the domains, with as many rows as there is room for, and what it is a table of."""
    if not rows:
        return []
    said = "Perplexity on windows that no calibration saw; *dense* is the base on the same windows."
    mean, dense = record.mean_perplexity, record.mean_dense_perplexity
    if len(rows) > 1 and mean is not None and dense is not None:
        said += f" Geometric mean: **{mean:.2f}** (dense {dense:.2f})."
    room -= len(said) + 2 + 40  # 40: how many are left out
    shown = len(rows)
    while shown and len(markdown_table(_HEADS, rows[:shown])) + 2 > room:
        shown -= 1
    left_out = len(rows) - shown
    return [
        markdown_table(_HEADS, rows[:shown]),
        said + (f" {left_out} more domains have no room here." if left_out else ""),
    ]


def _gates(entry: GatesEntry | None) -> str:
    if entry is None:
        return "Gates: they have not run yet."
    gates = entry.details.gates
    failed = [markdown_cell(gate.name) for gate in entry.details.failed]
    if entry.details.passed:
        verdict = f"all {len(gates)} **passed**"
    else:
        verdict = f"**failed**: {', '.join(failed)} ({len(failed)} of {len(gates)})"
    return f"Gates: {verdict}; entry {entry.number} of the log, of {entry.when}, and `gates.json` of the run."


def _where(number: int | None) -> str:
    return (
        "The page of the lineage is `lineage.html` among the artifacts of the run that made this version. What made it "
        f"is told in full by its `lineage.json`; `copal verify{'' if number is None else f' {number}'}` checks it."
    )


def _source(source: str) -> str:
    return (
        "a local folder" if Path(source).is_absolute() else f"`{markdown_cell(source)}`"
    )  # a path is nobody else's business
