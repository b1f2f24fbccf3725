"""How tables look on the terminal."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["plain_table"]


def plain_table(title: str | None, *headings: str, right: Collection[str] = ()) -> Table:
    """A table without a frame: thirty domains and eighty columns leave no room for one.

    A cell that is too long is folded, and nothing of it is lost.

    Args:
        right: headings of columns whose cells stand on the right, as numbers do.
    """
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in headings:
        table.add_column(heading, justify="right" if heading in right else "left", overflow="fold")
    return table
