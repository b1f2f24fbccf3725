"""The page of a lineage: one HTML file without scripts that loads nothing, for a browser or as an artifact. Pure.

What is drawn is computed here, `page.html` says how it looks; Jinja escapes all that comes from records and the log.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from flows.lineage.history import (
    History,
    Measure,
    gates_of,
    geometric_mean,
    log_text,
    measures,
    since_newest,
    step_texts,
    summary,
)
from flows.lineage.page.charts import chart, cut
from flows.lineage.record import flatten

__all__ = [
    "render_page",
]


_RATIOS = (1.0, 1.1, 1.25, 1.5, 2.0, 3.0)  # of perplexity to dense: where the heat map changes its colour


_LINEARS_SHOWN = 500  # rows of the table of linears: a mixture of experts has tens of thousands


_ROW = 46  # height of a version in the graph


_BLOCK = re.compile(r"\.(\d+)\.")


def render_page(history: History) -> str:
    """The page; what it tells of one version alone is of the newest (see `flows.lineage.history.up_to` for another)."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"short": _short, "figure": _figure, "percent": _percent, "utc": _utc}
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    lines = summary(history)[::-1]
    newest = history["versions"][-1] if history["versions"] else None
    champion = next((line["version"] for line in lines if "champion" in line["aliases"]), None)
    return template.render(
        model=history["model"],
        lines=lines,
        newest=newest,
        champion=champion,
        chained=all(line["chained"] is not False for line in lines),
        graph=_graph(lines),
        heat=_heat(history, lines),
        legend=_legend(),
        forgetting=_forgetting(history),
        by_version=_by_version(history),
        sparsity=_sparsity(newest),
        back=_back(newest),
        linears=_linears(newest),
        linears_left_out=max(0, len(newest["record"]["layers"]) - _LINEARS_SHOWN) if newest else 0,
        layers=list(_layers(history)),
        gates=[(line, gates) for line in lines if (gates := gates_of(history, line["version"], line["digest"]))],
        log=[(entry, log_text(entry)) for entry in history["log"][::-1] if entry["kind"] != "gates"],
        folded=list(_folded(newest)),
    )


def _graph(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The chain, newest on top: data on the left, versions in the middle, what became of them on the right."""
    nodes = []
    for place, line in enumerate(lines):
        y = _ROW * place + _ROW // 2
        gates = line["gates"]
        title = f"version {line['version']}: {line['step']}"
        if line["dvc_md5"]:
            title += f", data {line['dvc_md5']} of {line['repository']} at {line['git_rev']}"
        if gates:
            title += f", gates {'passed' if gates['passed'] else 'failed'}"
        nodes.append(
            {
                "y": y,
                "version": line["version"],
                "kind": "data" if line["domain"] else "root" if line["parent"] is None else "withdrawal",
                "label": cut(line["domain"] or line["step"], 16),
                "md5": (line["dvc_md5"] or "")[:10],
                "marks": cut(", ".join(line["aliases"]), 26),
                "gates": None if gates is None else gates["passed"],
                "title": title,
                "last": place == len(lines) - 1,
            }
        )
    return {"nodes": nodes, "height": _ROW * len(lines), "row": _ROW}


def _heat(history: History, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found = measures(history)
    cells = {(name, measure["version"]): measure for name, row in found.items() for measure in row}
    rows = [
        (line, [_cell(name, cells.get((name, line["version"]))) for name in found])
        for line in lines
        if line["parent"] is not None
    ]
    return {"domains": list(found), "dense": [row[-1]["dense"] for row in found.values()], "rows": rows}


def _cell(name: str, measure: Measure | None) -> dict[str, Any] | None:
    if measure is None:
        return None
    ratio = measure["perplexity"] / measure["dense"]
    title = f"{name} in version {measure['version']}: {measure['perplexity']:.4g}, {ratio:.3f} times dense"
    if not measure["comparable"]:
        title += "; measured on other data than the newest"
    heat = sum(ratio >= limit for limit in _RATIOS)
    return measure | {
        "ratio": ratio,
        "heat": heat,
        "title": title,
        "newest": measure["newest_in"] == measure["version"],
    }


def _legend() -> list[tuple[int, str]]:
    names = [f"under {_RATIOS[0]:g}"]
    names += [f"{low:g} to {high:g}" for low, high in pairwise(_RATIOS)]
    return list(enumerate([*names, f"{_RATIOS[-1]:g} or more"]))


def _forgetting(history: History) -> dict[str, Any]:
    """Of each domain the change since it was the newest, by version; and of all of them the mean and the worst."""
    order = [version["version"] for version in history["versions"]]
    lines, now = [], []
    by_version: dict[int, list[float]] = {}
    for name, first, after in since_newest(history):
        later = [measure for measure in after if measure["digest"] == first["digest"]]
        if not later:
            continue
        points = [(m["version"], m["perplexity"] / first["perplexity"] - 1) for m in (first, *later)]
        lines.append({"name": name, "kind": "thin", "points": [(order.index(v), y) for v, y in points]})
        for version, change in points[1:]:
            by_version.setdefault(version, []).append(change)
        now.append(
            {
                "domain": name,
                "newest_in": first["version"],
                "then": first["perplexity"],
                "version": later[-1]["version"],
                "now": later[-1]["perplexity"],
                "change": points[-1][1],
                "worst": max(change for _, change in points[1:]),
            }
        )
    for kind, of in (("mean", _mean), ("worst", max)):
        points = [(order.index(version), of(changes)) for version, changes in sorted(by_version.items())]
        lines.append({"name": kind, "kind": kind, "points": points})
    labels = [str(number) for number in order]
    return {
        "chart": chart(lines, labels, _percent, zero=True) if now else None,
        "now": sorted(now, key=lambda one: -one["change"]),
    }


def _by_version(history: History) -> list[dict[str, Any]]:
    """Charts of sparsity and of weights that came back, over the versions."""
    labels = [str(version["version"]) for version in history["versions"]]
    records = [version["record"] for version in history["versions"]]
    sparsity = [(place, record["sparsity"]["counted"]) for place, record in enumerate(records)]
    back = [(p, record["weights_back"]) for p, record in enumerate(records) if record["weights_back"] is not None]
    charts = []
    for title, points, write in (("Sparsity as counted", sparsity, _percent_plain), ("Weights back", back, _count)):
        if points:
            line = {"name": title, "kind": "mean", "points": points}
            charts.append({"title": title, "chart": chart([line], labels, write, zero=True)})
    return charts


def _sparsity(version: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A chart of sparsity by block: the mean, and the least and greatest of its linears."""
    blocks = _blocks(version["record"]["layers"]) if version else {}
    if not blocks:
        return None
    lines = []
    for name, kind, of in (("mean", "mean", _mean), ("least", "thin", min), ("greatest", "thin", max)):
        points = [(place, of([layer["sparsity"] for layer in layers])) for place, layers in enumerate(blocks.values())]
        lines.append({"name": name, "kind": kind, "points": points})
    return chart(lines, list(blocks), _percent_plain)


def _back(version: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A chart of the weights that came back, by block."""
    blocks = _blocks(version["record"]["layers"]) if version else {}
    sums = [sum(layer["weights_back"] or 0 for layer in layers) for layers in blocks.values()]
    if not any(sums):
        return None
    line = {"name": "weights back", "kind": "mean", "points": list(enumerate(sums))}
    return chart([line], list(blocks), _count, zero=True)


def _layers(history: History) -> Iterator[dict[str, Any]]:
    """For each version with layers, newest first, charts of layer error and response shift by block."""
    steps = step_texts(history)
    for version in reversed(history["versions"]):
        blocks = _blocks(version["record"]["layers"])
        if not blocks:
            continue
        line = partial(_by_block, blocks)
        errors = [line("before", "layer_error_before", "worst"), line("after", "layer_error_after", "mean")]
        shift = line("response shift", "response_shift", "mean")
        yield {
            "version": version["version"],
            "step": steps[version["version"]],
            "error": chart(errors, list(blocks), _small, log=True),
            "shift": chart([shift], list(blocks), _small) if shift["points"] else None,
            "has_before": bool(errors[0]["points"]),
        }


def _by_block(blocks: Mapping[str, Sequence[Mapping[str, Any]]], name: str, field: str, kind: str) -> dict[str, Any]:
    """A line of the geometric means of a field over the linears of each block."""
    points = []
    for place, layers in enumerate(blocks.values()):
        mean = geometric_mean([layer[field] for layer in layers if layer[field] is not None and layer[field] > 0])
        if mean is not None:
            points.append((place, mean))
    return {"name": name, "kind": kind, "points": points}


def _blocks(layers: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The linears by the number of their block, in order; those outside of blocks by their own name."""
    blocks: dict[str, list[Mapping[str, Any]]] = {}
    for layer in layers:
        found = _BLOCK.search(layer["name"])
        blocks.setdefault(found[1] if found else layer["name"], []).append(layer)
    return blocks


def _linears(version: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The linears of a version; of too many, those with the greatest error."""
    layers: list[Mapping[str, Any]] = version["record"]["layers"] if version else []
    if len(layers) <= _LINEARS_SHOWN:
        return layers
    return sorted(layers, key=lambda layer: -(layer["layer_error_after"] or 0.0))[:_LINEARS_SHOWN]


def _folded(version: Mapping[str, Any] | None) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    if version is not None:
        for section in ("settings", "libraries", "code", "hardware", "seeds", "base"):
            yield section, [(name, _text(value)) for name, value in flatten(version["record"][section])]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _short(text: str | None, length: int = 10) -> str:
    return (text or "")[:length]


def _figure(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _percent(share: float) -> str:
    return f"{share:+.1%}" if abs(share) < 0.0995 and share else f"{share:+.0%}" if share else "0%"


def _percent_plain(share: float) -> str:
    return f"{100 * share:.4g}%"


def _count(value: float) -> str:
    for size, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{name}"
    return f"{value:.3g}"


def _small(value: float) -> str:
    return f"{value:.3g}"


def _utc(text: str) -> str:
    """A time of a record or the log, shorter: both are in UTC."""
    return text[:16].replace("T", " ")
