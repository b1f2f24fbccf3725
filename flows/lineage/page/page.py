"""The page of a lineage: one HTML file without scripts that loads nothing, for a browser or as an artifact. Pure.

What is drawn is computed here, `page.html` says how it looks; Jinja escapes all that comes from records and the log,
and marks that turn the direction of writing around are spelled out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from copal.printable import printable_lines
from flows.lineage.figures import (
    count,
    figure,
    four_digits,
    geometric_mean,
    mean,
    percent,
    percent_plain,
    short,
    three_digits,
    utc,
)
from flows.lineage.history import (
    History,
    Line,
    Measure,
    Version,
    log_text,
    measures,
    since_newest,
    step_texts,
    summary,
)
from flows.lineage.page.charts import chart, cut
from flows.lineage.record import Layer, flatten
from flows.lineage.tasks import task_rows

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = [
    "render_page",
]


_RATIOS = (1.0, 1.1, 1.25, 1.5, 2.0, 3.0)  # of perplexity to dense: where the heat map changes its colour


_LINEARS_SHOWN = 500  # rows of the table of linears: a mixture of experts has tens of thousands


_ROW = 46  # height of a version in the graph


_BLOCK = re.compile(r"\.(\d+)\.")


def render_page(history: History) -> str:
    """The page; what it tells of one version alone is of the newest (see `flows.lineage.history.up_to` for another)."""
    lines = summary(history)[::-1]
    newest = history.versions[-1] if history.versions else None
    champion = next((line.version for line in lines if "champion" in line.aliases), None)
    return _template().render(
        model=history.model,
        lines=lines,
        newest=newest,
        champion=champion,
        chained=all(line.chained is not False for line in lines),
        graph=_graph(lines),
        heat=_heat(history, lines),
        legend=_legend(),
        forgetting=_forgetting(history),
        tasks=_tasks(history, lines),
        by_version=_by_version(history),
        sparsity=_sparsity(newest),
        back=_back(newest),
        linears=_linears(newest),
        linears_left_out=max(0, len(newest.record.layers) - _LINEARS_SHOWN) if newest else 0,
        layers=list(_layers(history)),
        gates=[(line, line.gates) for line in lines if line.gates is not None],
        log=[(entry, log_text(entry)) for entry in history.log[::-1] if entry.kind != "gates"],
        folded=list(_folded(newest)),
    )


@cache
def _template() -> Template:
    """How the page looks; compiled once."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_fit
    )
    environment.filters |= {
        "short": short,
        "figure": figure,
        "four_digits": four_digits,
        "percent": percent,
        "utc": utc,
    }
    return environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))


def _fit(value: Any) -> Any:
    """A value of the template, before Jinja escapes it; what the template makes itself (`Markup`) stays."""
    return printable_lines(value) if type(value) is str else value


def _graph(lines: Sequence[Line]) -> dict[str, Any]:
    """The chain, newest on top: data on the left, versions in the middle, what became of them on the right."""
    nodes = []
    for place, line in enumerate(lines):
        y = _ROW * place + _ROW // 2
        domain, gates = line.domain, line.gates
        title = f"version {line.version}: {line.step}"
        if domain:
            title += f", data {domain.dvc_md5} of {domain.repository} at {domain.git_rev}"
        if gates:
            title += f", gates {'passed' if gates.passed else 'failed'}"
        nodes.append(
            {
                "y": y,
                "version": line.version,
                "kind": "data" if domain else "root" if line.parent is None else "withdrawal",
                "label": cut(domain.name if domain else line.step, 16),
                "md5": short(domain.dvc_md5) if domain else "",
                "marks": cut(", ".join(line.aliases), 26),
                "gates": None if gates is None else gates.passed,
                "title": title,
                "last": place == len(lines) - 1,
            }
        )
    return {"nodes": nodes, "height": _ROW * len(lines), "row": _ROW}


def _heat(history: History, lines: Sequence[Line]) -> dict[str, Any]:
    found = measures(history)
    cells = {(name, measure.version): measure for name, row in found.items() for measure in row}
    rows = [
        (line, [_cell(name, cells.get((name, line.version))) for name in found])
        for line in lines
        if line.parent is not None
    ]
    return {"domains": list(found), "dense": [row[-1].dense for row in found.values()], "rows": rows}


def _cell(name: str, measure: Measure | None) -> dict[str, Any] | None:
    if measure is None:
        return None
    ratio = measure.perplexity / measure.dense
    title = f"{name} in version {measure.version}: {measure.perplexity:.4g}, {ratio:.3f} times dense"
    if not measure.comparable:
        title += "; measured on other data than the newest"
    heat = sum(ratio >= limit for limit in _RATIOS)
    return {
        "perplexity": measure.perplexity,
        "comparable": measure.comparable,
        "ratio": ratio,
        "heat": heat,
        "title": title,
        "newest": measure.newest_in == measure.version,
    }


def _legend() -> list[tuple[int, str]]:
    names = [f"under {_RATIOS[0]:g}"]
    names += [f"{low:g} to {high:g}" for low, high in pairwise(_RATIOS)]
    return list(enumerate([*names, f"{_RATIOS[-1]:g} or more"]))


def _forgetting(history: History) -> dict[str, Any]:
    """Of each domain the change since it was the newest, by version; and of all of them the mean and the worst."""
    order = [version.number for version in history.versions]
    lines, now = [], []
    by_version: dict[int, list[float]] = {}
    for name, first, after in since_newest(history):
        later = [measure for measure in after if measure.digest == first.digest]
        if not later:
            continue
        points = [(m.version, m.perplexity / first.perplexity - 1) for m in (first, *later)]
        lines.append({"name": name, "kind": "thin", "points": [(order.index(v), y) for v, y in points]})
        for version, change in points[1:]:
            by_version.setdefault(version, []).append(change)
        now.append(
            {
                "domain": name,
                "newest_in": first.version,
                "then": first.perplexity,
                "version": later[-1].version,
                "now": later[-1].perplexity,
                "change": points[-1][1],
                "worst": max(change for _, change in points[1:]),
            }
        )
    for kind, of in (("mean", mean), ("worst", max)):
        points = [(order.index(version), of(changes)) for version, changes in sorted(by_version.items())]
        lines.append({"name": kind, "kind": kind, "points": points})
    labels = [str(number) for number in order]
    return {
        "chart": chart(lines, labels, percent, zero=True) if now else None,
        "now": sorted(now, key=lambda one: -one["change"]),
    }


def _tasks(history: History, lines: Sequence[Line]) -> list[tuple[Line, list[dict[str, Any]]]]:
    """The rows of the versions whose domains have tasks."""
    asked = {version.number: version.record.tasks for version in history.versions}
    return [(line, task_rows(tasks)) for line in lines if (tasks := asked[line.version])]


def _by_version(history: History) -> list[dict[str, Any]]:
    """Charts of sparsity and of weights that came back, over the versions."""
    labels = [str(version.number) for version in history.versions]
    records = [version.record for version in history.versions]
    sparsity = [(place, record.sparsity.counted) for place, record in enumerate(records)]
    back = [(p, record.weights_back) for p, record in enumerate(records) if record.weights_back is not None]
    charts = []
    for title, points, write in (("Sparsity as counted", sparsity, percent_plain), ("Weights back", back, count)):
        if points:
            line = {"name": title, "kind": "mean", "points": points}
            charts.append({"title": title, "chart": chart([line], labels, write, zero=True)})
    return charts


def _sparsity(version: Version | None) -> dict[str, Any] | None:
    """A chart of sparsity by block: the mean, and the least and greatest of its linears."""
    blocks = _blocks(version.record.layers) if version else {}
    if not blocks:
        return None
    lines = []
    for name, kind, of in (("mean", "mean", mean), ("least", "thin", min), ("greatest", "thin", max)):
        points = [(place, of([layer.sparsity for layer in layers])) for place, layers in enumerate(blocks.values())]
        lines.append({"name": name, "kind": kind, "points": points})
    return chart(lines, list(blocks), percent_plain)


def _back(version: Version | None) -> dict[str, Any] | None:
    """A chart of the weights that came back, by block."""
    blocks = _blocks(version.record.layers) if version else {}
    sums = [sum(layer.weights_back or 0 for layer in layers) for layers in blocks.values()]
    if not any(sums):
        return None
    line = {"name": "weights back", "kind": "mean", "points": list(enumerate(sums))}
    return chart([line], list(blocks), count, zero=True)


def _layers(history: History) -> Iterator[dict[str, Any]]:
    """For each version with layers, newest first, charts of layer error and response shift by block."""
    steps = step_texts(history)
    for version in reversed(history.versions):
        blocks = _blocks(version.record.layers)
        if not blocks:
            continue
        line = partial(_by_block, blocks)
        errors = [
            line("before", attrgetter("layer_error_before"), "worst"),
            line("after", attrgetter("layer_error_after"), "mean"),
        ]
        shift = line("response shift", attrgetter("response_shift"), "mean")
        yield {
            "version": version.number,
            "step": steps[version.number],
            "error": chart(errors, list(blocks), three_digits, log=True),
            "shift": chart([shift], list(blocks), three_digits) if shift["points"] else None,
            "has_before": bool(errors[0]["points"]),
        }


def _by_block(
    blocks: Mapping[str, Sequence[Layer]], name: str, field: Callable[[Layer], float | None], kind: str
) -> dict[str, Any]:
    """A line of the geometric means of a field over the linears of each block."""
    points = []
    for place, layers in enumerate(blocks.values()):
        middle = geometric_mean([value for layer in layers if (value := field(layer)) is not None and value > 0])
        if middle is not None:
            points.append((place, middle))
    return {"name": name, "kind": kind, "points": points}


def _blocks(layers: Sequence[Layer]) -> dict[str, list[Layer]]:
    """The linears by the number of their block, in order; those outside of blocks by their own name."""
    blocks: dict[str, list[Layer]] = {}
    for layer in layers:
        found = _BLOCK.search(layer.name)
        blocks.setdefault(found[1] if found else layer.name, []).append(layer)
    return blocks


def _linears(version: Version | None) -> Sequence[Layer]:
    """The linears of a version; of too many, those with the greatest error."""
    layers = version.record.layers if version else ()
    if len(layers) <= _LINEARS_SHOWN:
        return layers
    return sorted(layers, key=lambda layer: -(layer.layer_error_after or 0.0))[:_LINEARS_SHOWN]


def _folded(version: Version | None) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    if version is not None:
        record = version.record.as_json()
        for section in ("settings", "libraries", "code", "hardware", "seeds", "base"):
            yield section, [(name, _text(value)) for name, value in flatten(record[section])]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
