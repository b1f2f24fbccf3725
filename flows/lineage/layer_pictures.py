"""What a step did to each linear, block by block, as pictures: sparsity, layer error and response shift. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from flows.lineage.drawing import COLOURS, MARKERS, cut, new_figure
from flows.lineage.figures import mean
from flows.lineage.record import Layer, Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["layer_pictures"]

_LINES = len(COLOURS)
_PARTS: tuple[tuple[str, str, str, Callable[[Layer], float | None], bool], ...] = (
    ("sparsity-by-layer", "Sparsity", "share of zeros", lambda layer: layer.sparsity, False),
    (
        "layer-error",
        "Layer error on the domain of the step",
        "tr(ΔW G ΔWᵀ) / tr(W G Wᵀ)",
        lambda layer: layer.layer_error_after,
        True,
    ),
    (
        "response-shift",
        "Response shift of the domain of the step",
        "tr(W G_new Wᵀ) / tr(W G_old Wᵀ)",
        lambda layer: layer.response_shift,
        True,
    ),
)


def layer_pictures(record: Record, version: int) -> dict[str, Callable[[], Figure]]:
    """Name of a picture -> what draws it; what the step has no figures of is not drawn."""
    found = {}
    for name, title, label, value, log in _PARTS:
        lines = _by_kind(record.layers, value)
        if lines:
            found[name] = _drawer(f"{title}\nversion {version}", label, lines, log)
    return found


def _drawer(title: str, label: str, lines: Mapping[str, Sequence[float]], log: bool) -> Callable[[], Figure]:
    return lambda: _draw(title, label, lines, log)


def _by_kind(layers: Sequence[Layer], value: Callable[[Layer], float | None]) -> dict[str, list[float]]:
    """Kind of a linear -> its value by block; experts count as one kind, by their mean."""
    blocks: dict[str, dict[int, list[float]]] = {}
    for layer in layers:
        named, number = re.match(r".*?\.(\d+)\.(.+)", layer.name), value(layer)
        if named and number is not None and math.isfinite(number):
            kind = re.sub(r"\.\d+\.", ".*.", named[2])
            blocks.setdefault(kind, {}).setdefault(int(named[1]), []).append(number)
    return {kind: [mean(found[block]) for block in sorted(found)] for kind, found in blocks.items()}


def _draw(title: str, label: str, lines: Mapping[str, Sequence[float]], log: bool) -> Figure:
    from matplotlib.ticker import LogLocator, NullLocator

    figure, axes = new_figure(3.8)
    for place, (kind, values) in enumerate(list(lines.items())[:_LINES]):
        marker = MARKERS[place] if len(values) <= 12 else None
        axes.plot(values, color=COLOURS[place], marker=marker, linewidth=1.4, label=cut(kind, 28))
    if log and all(value > 0 for values in lines.values() for value in values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("block")
    axes.set_ylabel(label)
    axes.grid(axis="y", color="#dddddd")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    rest = f"\nthe first {_LINES} of {len(lines)} kinds" if len(lines) > _LINES else ""
    axes.set_title(f"{title}{rest}")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure
