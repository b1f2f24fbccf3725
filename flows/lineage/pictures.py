"""Pictures of a lineage as PNG and SVG files: the perplexity matrix, what was forgotten, and the newest step's layers.

Pure: the same history and the same matplotlib give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flows.lineage.drawing import COLOURS, MARKERS, STYLE, cut, new_figure
from flows.lineage.history import History, Measure, measures, since_newest, step_texts
from flows.lineage.layer_pictures import layer_pictures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_pictures"]

_ROWS, _COLUMNS = 30, 24  # of the matrix; what is older, or has more, is on the page of the lineage
_FIGURES_IN = 9  # columns: of more there is no room for figures in the cells
_LINES = 8  # of more domains, those that were forgotten most
_WORST = 3.0  # times dense: where the colours end


def draw_pictures(history: History, folder: Path) -> list[Path]:
    """Write `perplexity-matrix`, `forgetting` and what `layer_pictures` has of the newest version as .png and .svg into
    `folder`; gives the files.

    A picture with nothing in it is not drawn: no matrix without a pruned version that knows a domain, and nothing can
    be forgotten before a domain's second version.
    """
    pictures: list[tuple[str, Callable[[], Figure]]] = []
    columns = measures(history)
    if columns:
        pictures.append(("perplexity-matrix", lambda: _matrix(history, columns)))
    changes = _changes(history)
    if changes:
        pictures.append(("forgetting", lambda: _forgetting(history, changes)))
    if history.versions:
        newest = history.versions[-1]
        pictures += layer_pictures(newest.record, newest.number).items()
    if not pictures:
        return []
    from matplotlib import style

    files = []
    with style.context(["default", STYLE]):  # not that of whoever runs the step
        for name, draw in pictures:
            figure = draw()
            layout = figure.get_layout_engine()
            assert layout is not None
            layout.execute(figure)  # once for both files
            figure.set_layout_engine(None)  # with any, "none" too, each file is drawn twice
            for kind, unsaid in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
                files.append(folder / f"{name}.{kind}")
                figure.savefig(files[-1], metadata=unsaid)
    return files


def _matrix(history: History, found: Mapping[str, Sequence[Measure]]) -> Figure:
    """Heat map: a row for each pruned version, the newest on top, and a column for each domain that it knows."""
    import numpy as np
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    steps = step_texts(history)
    numbers = [version.number for version in history.versions if version.parent is not None]
    rows = numbers[: -_ROWS - 1 : -1]
    known = {name: row for name, row in found.items() if any(measure.version in rows for measure in row)}
    shown = dict(list(known.items())[-_COLUMNS:])
    wide = len(shown) <= 5
    ratios = np.full((len(rows), len(shown)), np.nan)
    cells = {}
    for column, row in enumerate(shown.values()):
        for measure in row:
            if measure.version in rows:
                place = rows.index(measure.version)
                cells[place, column] = measure
                ratios[place, column] = measure.perplexity / measure.dense
    figure, axes = new_figure(1.9 + 0.3 * len(rows))
    axes.set_facecolor("#eeeeee")
    image = axes.imshow(ratios, cmap="cividis_r", norm=LogNorm(1, _WORST, clip=True), aspect="auto")
    for (place, column), measure in cells.items():
        _cell(
            axes,
            place,
            column,
            measure,
            digits=4 if wide else 3 if len(shown) <= _FIGURES_IN else 0,
            dark=ratios[place, column] > 1.6,
        )
    labels = [cut(name, 12) for name in shown]
    if wide:
        labels = [f"{label}\ndense {row[-1].dense:.4g}" for label, row in zip(labels, shown.values(), strict=True)]
    axes.set_xticks(range(len(shown)), labels, rotation=0 if wide else 90)
    axes.set_yticks(range(len(rows)), [f"{number}: {cut(steps[number], 14)}" for number in rows])
    axes.tick_params(length=0)
    left_out = [
        f"the newest {len(rows)} of {len(numbers)} versions" if len(rows) < len(numbers) else "",
        f"the newest {len(shown)} of {len(found)} domains" if len(shown) < len(found) else "",
    ]
    axes.set_title("\n".join(["Perplexity by version and domain", *filter(None, left_out)]))
    notes = "white frame: the version adapted to it"
    if not all(measure.comparable for measure in cells.values()):
        notes += "; ′: on other data than now"
    axes.set_xlabel(notes, fontsize=8)
    ticks = [1, 1.25, 1.5, 2, 3]
    bar = figure.colorbar(image, label="times dense", ticks=FixedLocator(ticks), fraction=0.05, pad=0.03)
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{'+' if value == _WORST else ''}"))
    return figure


def _cell(axes: Axes, place: int, column: int, measure: Measure, *, digits: int, dark: bool) -> None:
    from matplotlib.patches import Rectangle

    if digits:
        text = f"{measure.perplexity:.{digits}g}{'' if measure.comparable else '′'}"
        axes.text(column, place, text, ha="center", va="center", color="white" if dark else "black")
    if measure.newest_in == measure.version:
        box = Rectangle((column - 0.44, place - 0.44), 0.88, 0.88, fill=False, edgecolor="white", linewidth=1.6)
        axes.add_patch(box)


def _changes(history: History) -> list[tuple[str, list[tuple[int, float]]]]:
    """(domain, (version, change of its perplexity since the version that adapted to it)), the most forgotten first."""
    changes, spells = [], list(since_newest(history))
    for name, first, after in spells:
        later = [measure for measure in after if measure.digest == first.digest]
        if later:
            points = [(one.version, one.perplexity / first.perplexity - 1) for one in (first, *later)]
            again = sum(other == name for other, *_ in spells) > 1
            changes.append((f"{cut(name, 12)} of {first.version}" if again else name, points))
    return sorted(changes, key=lambda change: -change[1][-1][1])


def _forgetting(history: History, changes: Sequence[tuple[str, list[tuple[int, float]]]]) -> Figure:
    """A line for each domain, from the version that adapted to it."""
    from matplotlib.ticker import PercentFormatter

    order = [version.number for version in history.versions if version.parent is not None]
    figure, axes = new_figure(3.6)
    axes.axhline(0, color="#555555", linewidth=1)
    for place, (name, points) in enumerate(changes[:_LINES]):
        axes.plot(
            [order.index(version) for version, _ in points],
            [change for _, change in points],
            color=COLOURS[place],
            marker=MARKERS[place],
            linewidth=1.8,
            label=f"{cut(name, 18)} {points[-1][1]:+.1%}",
        )
    step = max(1, math.ceil(len(order) / 10))
    axes.set_xticks(range(0, len(order), step), [str(number) for number in order[::step]])
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol="%"))
    axes.grid(axis="y", color="#dddddd")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("version")
    rest = f"\nthe {_LINES} most forgotten of {len(changes)}" if len(changes) > _LINES else ""
    axes.set_title(f"Perplexity since the version that adapted to it{rest}")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure
