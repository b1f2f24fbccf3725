"""What rich draws, fit to be shown. It brings rich, which takes a while: imported where something is drawn."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.segment import Segment

from copal.printable import printable_lines

__all__ = ["Fitting"]


class Fitting(RenderHook):
    """A hook of a console: of all that it draws, the text is fit to be shown. Colours are rich's own."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Fit(each) for each in renderables]


class _Fit:
    def __init__(self, drawn: ConsoleRenderable) -> None:
        self._drawn = drawn

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        def fitting() -> Iterator[Segment]:
            for segment in console.render(self._drawn, options):
                # A control moves the cursor of a progress bar: it holds no text.
                yield segment if segment.control else Segment(printable_lines(segment.text), segment.style)

        return fitting()
