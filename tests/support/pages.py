"""What pages for people hold: fenced blocks with commands, and tables."""

from __future__ import annotations

import re
import shlex

_ENDS = {";", "&&", "||", "|", "&"}


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a page that are marked with `language`."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(block: str) -> list[list[str]]:
    """The words of each command of a shell block, without variables that are set for it and without redirections."""
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(re.sub(r"(^|\s)#.*", "", line), posix=True, punctuation_chars=";&|<>")
        lexer.whitespace_split, lexer.commenters = True, ""
        words: list[str] = []
        redirected = False
        for word in [*lexer, ";"]:
            if word in _ENDS:
                found += [words] if words else []
                words = []
            elif word in ("<", ">", ">>"):
                redirected = True
            elif redirected:
                redirected = False
            elif words or not re.match(r"\w+=", word):
                words.append(word)
    return found


def tables(text: str) -> list[tuple[list[str], str]]:
    """The tables of a page: the cells below the heading, and the paragraph after the table ("" where there is none)."""
    found = []
    for rows, after in re.findall(r"(?:^\|.*\n)\|[-|: ]+\|\n((?:\|.*\n?)+)\n*((?:.+\n?)*)", text, re.MULTILINE):
        cells = [cell.strip() for row in rows.splitlines() for cell in row.strip().strip("|").split("|")]
        found.append((cells, after.rstrip("\n")))
    return found


def is_figure(cell: str) -> bool:
    """Whether a cell of a table holds what was measured or computed: a number, with or without a unit and a share."""
    unit = "GB|MB|T|s|min|%"
    return not cell.isdigit() and bool(re.match(rf"\**\d[\d,]*(\.\d+)?( ?({unit}))?(\**$| )", cell))
