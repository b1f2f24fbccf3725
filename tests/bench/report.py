"""The tables of docs/algorithm.md and PNG plots of what matrix.py measured: python tests/bench/report.py

Reads bench/metrics/ and bench/layers/; writes bench/tables.md, bench/plots/ and the picture of the front page.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from matrix import AGAIN, METHODS, OUT, SPARSITIES

from copal.files import write_atomic
from flows.start.domains import DOMAINS

PICTURE = Path(__file__).parents[2] / "docs" / "images" / "forgetting.png"  # the front page's
LABELS = {
    "dense": "dense",
    "magnitude": "magnitude",
    "wanda-newest": "Wanda, newest domain",
    "wanda-all": "Wanda, all domains",
    "sparsegpt-newest": "SparseGPT, newest domain",
    "sparsegpt-all": "SparseGPT, all domains",
    "copal": "copal",
}
COLOURS = {
    "magnitude": "#999999",
    "wanda-newest": "#e69f00",
    "wanda-all": "#b35900",
    "sparsegpt-newest": "#56b4e9",
    "sparsegpt-all": "#0072b2",
    "copal": "#009e73",
}
BY_STEP = {
    "copal": "copal",
    "sparsegpt-newest": "SparseGPT, anew from the dense model",
    "wanda-newest": "Wanda, anew from the dense model",
    "sparsegpt-again": "SparseGPT, domain by domain",
    "wanda-again": "Wanda, domain by domain",
}
LINEARS = matplotlib.color_sequences["tab10"]

Layers = Mapping[str, list[float]]


def tables(out: Path) -> str:
    """The tables of docs/algorithm.md in markdown: geometric means by sparsity, and domains where half is pruned."""
    read = _read(out / "metrics")
    lines = [f"| | {' | '.join(_percent(key) for key in SPARSITIES)} |", "|---|" + "---|" * len(SPARSITIES)]
    for method, label in LABELS.items():
        cells = [read["dense-0" if method == "dense" else f"{method}-{key}"] for key in SPARSITIES]
        figures = (f"{cell['geometric_mean']:.2f} ({cell['against_dense']:.2f})" for cell in cells)
        lines.append(f"| {label} | {' | '.join(figures)} |")
    lines += ["", f"| {_percent('50')} | {' | '.join(DOMAINS)} |", "|---|" + "---|" * len(DOMAINS)]
    for method, label in LABELS.items():
        cell = read["dense-0" if method == "dense" else f"{method}-50"]
        figures = (f"{cell['perplexity'][name]:.2f}" for name in DOMAINS)
        lines.append(f"| {label} | {' | '.join(figures)} |")
    return "\n".join(lines)


def draw(out: Path) -> list[Path]:
    """Draw everything from `out`/metrics and `out`/layers into `out`/plots; returns the files."""
    metrics, layers = _read(out / "metrics"), _read(out / "layers")
    chains = {name.removeprefix("chain-"): found for name, found in metrics.items() if name.startswith("chain-")}
    figures = {
        "steps": steps(
            {method: chains[method]["perplexity"] for method in BY_STEP if method in chains},
            metrics["dense-0"]["perplexity"],
        ),
        "perplexity-matrix": perplexity_matrix(chains["copal"]["perplexity"], metrics["dense-0"]["perplexity"]),
        "forgetting": forgetting({method: chains[method]["forgetting"] for method in METHODS if method in chains}),
        "layer-error": layer_error({method: layers[f"{method}-50"] for method in METHODS}),
        "new-domain": new_domain(layers["chain-copal"]),
    }
    (out / "plots").mkdir(parents=True, exist_ok=True)
    files = []
    for name, figure in figures.items():
        files.append(out / "plots" / f"{name}.png")
        # Without the version of matplotlib in it: the same figures give the same file.
        figure.savefig(files[-1], dpi=120, metadata={"Software": None})
    return files


def steps(by_method: Mapping[str, Mapping[str, Mapping[str, float]]], dense: Mapping[str, float]) -> Figure:
    """A panel for each domain: its perplexity after each step, from the one that adapted to it on."""
    figure, *panels = _figure(11, 4.2, len(DOMAINS))
    places = {name: place for place, name in enumerate(DOMAINS)}
    most = max(found[newest][name] for found in by_method.values() for newest in DOMAINS for name in _met(newest))
    for axes, name in zip(panels, DOMAINS, strict=True):
        for method, found in by_method.items():
            met = [newest for newest in DOMAINS if name in _met(newest)]
            line = [found[newest][name] for newest in met]
            again = method.endswith(AGAIN)
            axes.plot([places[newest] for newest in met], line, marker="s" if again else "o",
                      linestyle=":" if again else "-", linewidth=2, color=COLOURS[method.replace(AGAIN, "-newest")],
                      label=BY_STEP[method])  # fmt: skip
        axes.axhline(dense[name], color="black", linestyle="--", linewidth=1, label="dense model")
        axes.set_yscale("log")
        axes.set_ylim(min(dense.values()) * 0.85, most * 1.2)
        _plain_log(axes)
        axes.set_xlim(-0.3, len(DOMAINS) - 0.7)
        axes.set_xticks(range(len(DOMAINS)), [f"step {place + 1}:\n{newest}" for newest, place in places.items()])
        axes.set_title(f"perplexity on {name}")
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def _met(newest: str) -> tuple[str, ...]:
    """The domains met when this one was the newest."""
    return DOMAINS[: DOMAINS.index(newest) + 1]


def perplexity_matrix(perplexity: Mapping[str, Mapping[str, float]], dense: Mapping[str, float]) -> Figure:
    """Heat map of perplexity / dense: a row for each step's version, a column for each domain."""
    figure, axes = _figure(6.4, 4.2)
    values = [[perplexity[newest][domain] / dense[domain] for domain in DOMAINS] for newest in DOMAINS]
    image = axes.imshow(values, cmap="YlOrRd", norm=LogNorm(vmin=1, vmax=max(1.1, *map(max, values))))
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            dark = image.norm(value) > 0.6
            text = f"{value:.2f}" if column <= row else f"{value:.2f}\nnot yet met"
            axes.text(column, row, text, ha="center", va="center", color="white" if dark else "black")
    axes.set_xticks(range(len(DOMAINS)), DOMAINS)
    axes.set_yticks(range(len(DOMAINS)), [f"{number}: {name}" for number, name in enumerate(DOMAINS, start=2)])
    axes.set_xlabel("evaluated on")
    axes.set_ylabel("version: adapted to")
    axes.set_title("copal, half pruned: perplexity / that of the dense base")
    bar = figure.colorbar(image, label="times dense")
    _plain_log(bar.ax)
    return figure


def forgetting(by_method: Mapping[str, Mapping[str, float]]) -> Figure:
    """Bars: an earlier domain's perplexity after the last step / when it was the newest."""
    figure, axes = _figure(8, 4.2)
    earlier = DOMAINS[:-1]
    width = 0.8 / len(earlier)
    for number, domain in enumerate(earlier):
        places = [place + (number - (len(earlier) - 1) / 2) * width for place in range(len(by_method))]
        times = [found[domain] for found in by_method.values()]
        bars = axes.bar(places, [value - 1 for value in times], width * 0.94, 1, label=domain, color=LINEARS[number])
        axes.bar_label(bars, [f"{value:.2f}" for value in times], padding=2)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_yscale("log")
    _plain_log(axes)
    axes.margins(y=0.12)
    axes.set_xticks(range(len(by_method)), [LABELS[method].replace(", ", "\n") for method in by_method])
    axes.set_ylabel("perplexity after the last step\n/ when the domain was the newest")
    axes.set_title("Forgetting, half pruned (1: nothing forgotten)")
    axes.legend(title="earlier domain")
    return figure


def layer_error(by_method: Mapping[str, Layers]) -> Figure:
    """Layer error on the newest domain by block: of every method (mean of its linears), and of copal's linears."""
    figure, left, right = _figure(12, 4.6, 2)
    for method, linears in by_method.items():
        left.plot(_mean(linears.values()), label=LABELS[method], color=COLOURS[method])
    for number, (linear, values) in enumerate(by_method["copal"].items()):
        right.plot(values, label=linear, color=LINEARS[number % len(LINEARS)])
    left.set_title("mean over the linears of a block, by method")
    right.set_title("copal, by linear")
    left.set_ylabel("layer error on the newest domain")
    for axes in (left, right):
        _by_block(axes)
        axes.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.19))
    figure.suptitle("Layer error tr((W-W')G(W-W')ᵀ) / tr(WGWᵀ), half pruned")
    return figure


def new_domain(chain: Mapping[str, Mapping[str, Layers]]) -> Figure:
    """How each later domain meets the model: response shift by linear, and layer error before and after its step."""
    met = {name: found for name, found in chain.items() if found["before"]}
    figure, *panels = _figure(12, 7.6, len(met), rows=2)
    for (name, found), shift, error in zip(met.items(), panels, panels[len(met) :], strict=False):
        for number, (linear, values) in enumerate(found["shift"].items()):
            shift.plot(values, label=linear, color=LINEARS[number % len(LINEARS)], linewidth=1.2)
        shift.axhline(1, color="black", linewidth=0.8)
        shift.set_title(f"{name}: response shift tr(W G_new Wᵀ) / tr(W G_old Wᵀ)")
        for when, colour, style in (("before", "#d55e00", "--"), ("after", COLOURS["copal"], "-")):
            blocks = list(zip(*found[when].values(), strict=True))
            error.plot(_mean(found[when].values()), label=f"{when} its step", color=colour, linestyle=style)
            error.fill_between(range(len(blocks)), [*map(min, blocks)], [*map(max, blocks)], color=colour, alpha=0.15)
        error.set_title(f"{name}: layer error (mean and range of a block's linears)")
        for axes in (shift, error):
            _by_block(axes)
            axes.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.19))
    figure.suptitle("How a new domain meets the model (copal, half pruned)")
    return figure


def _percent(key: str) -> str:
    return key.replace("-", ":") if "-" in key else f"{key}%"


def _read(folder: Path) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def _figure(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple[Any, ...]:
    """A figure that no window shows, and its panels row by row."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, *figure.subplots(rows, columns, squeeze=False).flat


def _plain_log(axes: Axes) -> None:
    """Label a logarithmic axis with a few plain numbers."""
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _by_block(axes: Axes) -> None:
    axes.set_yscale("log")
    _plain_log(axes)
    axes.set_xlabel("block")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)


def _mean(lines: Iterable[list[float]]) -> list[float]:
    return [sum(values) / len(values) for values in zip(*lines, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="where metrics and layers lie (default: %(default)s)")
    out = parser.parse_args().out
    write_atomic(out / "tables.md", tables(out) + "\n")
    files = draw(out)
    PICTURE.parent.mkdir(exist_ok=True)
    shutil.copyfile(files[0], PICTURE)
    print(tables(out))


if __name__ == "__main__":
    main()
