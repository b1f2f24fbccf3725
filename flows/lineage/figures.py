"""How figures and the words of others are written for people."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from copal.printable import printable

__all__ = [
    "count",
    "figure",
    "four_digits",
    "geometric_mean",
    "gigabytes",
    "markdown_cell",
    "markdown_table",
    "mean",
    "percent",
    "percent_plain",
    "short",
    "three_digits",
    "timespan",
    "utc",
]


def mean(values: Sequence[float]) -> float:
    """Of at least one number."""
    return math.fsum(values) / len(values)


def geometric_mean(values: Sequence[float]) -> float | None:
    """Of positive numbers; None of none."""
    return math.exp(math.fsum(map(math.log, values)) / len(values)) if values else None


def markdown_table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown; cells must hold no `|` and no end of line."""
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, *rows)]
    return "\n".join([lines[0], "|---" * (lines[0].count("|") - 1) + "|", *lines[1:]])


def markdown_cell(text: str) -> str:
    """Text of others as a part of a Markdown table: it starts no cell, no code, no tag and no line of its own."""
    kept = printable(text)
    for letter, written in (("|", "/"), ("`", "'"), ("<", "‹"), (">", "›"), ("*", "∗")):
        kept = kept.replace(letter, written)
    return kept if len(kept) <= 80 else f"{kept[:79]}…"


def short(text: str | None, length: int = 10) -> str:
    """The beginning of a hash."""
    return (text or "")[:length]


def figure(value: float | None, digits: int = 2, nothing: str = "–") -> str:
    """With commas between thousands."""
    return nothing if value is None else f"{value:,.{digits}f}"


def four_digits(value: float | None) -> str:
    """With four digits that count; "" of none."""
    return "" if value is None else f"{value:.4g}"


def three_digits(value: float) -> str:
    """With three digits that count."""
    return f"{value:.3g}"


def percent(share: float) -> str:
    """A change, with its sign; of small ones a digit after the point."""
    return f"{share:+.1%}" if abs(share) < 0.0995 and share else f"{share:+.0%}" if share else "0%"


def percent_plain(share: float) -> str:
    """A share, without a sign."""
    return f"{100 * share:.4g}%"


def count(value: float) -> str:
    """A large number, as 1.2M."""
    for size, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{name}"
    return f"{value:.3g}"


def gigabytes(size: float) -> str:
    """Bytes, as 13.5 GB or 101 MB: powers of ten."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def timespan(seconds: float) -> str:
    """As 12 s, 3.4 min or 2.1 h."""
    for size, name in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.0f} s" if seconds >= 9.5 else f"{seconds:.1f} s"


def utc(text: str) -> str:
    """A time of a record or the log, shorter: both are in UTC."""
    return text[:16].replace("T", " ")
