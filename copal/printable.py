"""Text of others, fit for a terminal, a page, a log: nothing in it is obeyed."""

from __future__ import annotations

__all__ = ["printable", "printable_lines"]


def printable(text: object) -> str:
    """`text` on one line, with what a terminal or a browser would obey spelled out, as in `\\x1b`.

    That is what Unicode calls a control, a format (marks that turn the direction of writing around, invisible letters),
    a separator of lines, half a surrogate pair, or nothing yet.
    """
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(text))


def printable_lines(text: str) -> str:
    """`printable`, where the ends of lines and tabs are copal's own, and stay."""
    return "".join(letter if letter in "\n\t" else printable(letter) for letter in text)
