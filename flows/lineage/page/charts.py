"""The charts of the page: SVG paths and labels, computed here and drawn by `page.html`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = [
    "chart",
    "cut",
]


WIDTH, HEIGHT = 360, 190  # of a chart; as wide as a phone, so that its text keeps its size there


LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 24  # margins of a chart


def chart(
    lines: Sequence[Mapping[str, Any]], labels: Sequence[str], write: Any, *, log: bool = False, zero: bool = False
) -> dict[str, Any] | None:
    """What `page.html` draws: ticks, and a line or a dot for each of `lines`, {name, kind, points: [(place, value)]}.

    `zero`: 0 is among the values shown. `log`: on powers of ten; values above 0 only.
    """
    values = [value for line in lines for _, value in line["points"]]
    if not values:
        return None
    low, high, ticks = _log_ticks(values) if log else _ticks([*values, 0.0] if zero else values)

    def x(place: int) -> float:
        room = WIDTH - LEFT - RIGHT
        return round(LEFT + room * (place / (len(labels) - 1) if len(labels) > 1 else 0.5), 1)

    def y(value: float) -> float:
        share = (math.log(value / low) / math.log(high / low)) if log else (value - low) / (high - low)
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share, 1)

    step = max(1, math.ceil(len(labels) / 8))
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "bottom": HEIGHT - BOTTOM,
        "y_ticks": [(y(tick), write(tick)) for tick in ticks],
        "x_ticks": [(x(place), cut(labels[place], 6)) for place in range(0, len(labels), step)],
        "lines": [
            {
                "kind": line["kind"],
                "title": f"{line['name']}: {write(line['points'][0][1])} to {write(line['points'][-1][1])}",
                "points": [(x(place), y(value)) for place, value in line["points"]],
            }
            for line in lines
            if line["points"]
        ],
    }


def _ticks(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """(low, high, ticks) that enclose the values, at 1, 2 or 5 times a power of ten."""
    low, high = min(values), max(values)
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-9):
        margin = abs(high) * 0.1 or 1.0
        low, high = low - margin, high + margin
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(power * times for times in (1, 2, 5, 10) if power * times * 4 >= high - low)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [round(step * count, 12) for count in range(first, last + 1)]
    return ticks[0], ticks[-1], ticks


def _log_ticks(values: Sequence[float]) -> tuple[float, float, list[float]]:
    first, last = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    last = max(last, first + 1)
    every = max(1, math.ceil((last - first) / 5))
    return 10.0**first, 10.0**last, [10.0**power for power in range(first, last + 1, every)]


def cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
