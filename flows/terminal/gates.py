"""Gate results as a table for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flows.lineage.entries import GatesEntry
from flows.lineage.figures import four_digits
from flows.terminal.tables import plain_table

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = [
    "render_gates",
]


def render_gates(entry: GatesEntry) -> RenderableType:
    """A log entry with gate results, for people."""
    from rich.text import Text

    bad = len(entry.details.failed)
    verdict = f"{bad} failed" if bad else "all passed"
    title = f"gates of version {entry.version}, {entry.when}: {verdict}"
    table = plain_table(title, "gate", "", "value", "limit", "", right=("value", "limit"))
    for gate in entry.details.gates:
        said = Text("passed", "green") if gate.passed else Text("failed", "bold red")
        table.add_row(gate.name, said, four_digits(gate.value), four_digits(gate.limit), Text(gate.detail))
    return table
