"""What the pictures of a lineage have in common: a phone's width, colours that the colour-blind can tell apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from copal.printable import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "MARKERS", "STYLE", "cut", "new_figure"]

_WIDTH, _DPI = 5.0, 160  # inches; 800 pixels
# Okabe and Ito's colours, without yellow, which is hard to see on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
STYLE = {
    "svg.hashsalt": "copal",  # else the names in an SVG file are drawn by lot
    "text.parse_math": False,  # a dollar sign in the name of a domain is one
    "font.size": 9,
    "axes.titlesize": 10,
    "figure.dpi": _DPI,
}


def new_figure(height: float) -> tuple[Figure, Any]:
    """A figure of this height in inches that no window shows, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def cut(text: str, length: int) -> str:
    """A name in at most `length` characters, fit to be shown."""
    text = printable(text)
    return text if len(text) <= length else f"{text[: length - 1]}…"
