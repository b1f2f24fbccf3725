"""The chain of versions as a tree for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flows.lineage.figures import short
from flows.lineage.history import History, log_text, summary

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = [
    "render_history",
]


def render_history(history: History) -> RenderableType:
    """The chain for people: one branch a version, oldest first; below it its data, its gates, and its log entries."""
    from rich.text import Text
    from rich.tree import Tree

    def text(*parts: tuple[str, str]) -> Text:  # no string: a style each
        return Text.assemble(*((part, style) for part, style in parts), overflow="fold")

    tree = Tree(text((history.model, "bold")))
    for line in summary(history):
        parts = [(f"version {line.version}", "bold cyan"), (f"  {line.step}", "bold")]
        if line.domain:
            parts.append((f"  {short(line.domain.dvc_md5)}", "dim"))
        if line.perplexity is not None:
            parts.append((f"  perplexity {line.perplexity:.2f} ({line.ratio:.2f} x dense)", ""))
        if line.sparsity:
            parts.append((f"  sparsity {line.sparsity:.3f}", ""))
        if line.aliases:
            parts.append((f"  {', '.join(line.aliases)}", "bold magenta"))
        branch = tree.add(text(*parts))
        if line.domain:
            source = f"data: {line.domain.repository} at {short(line.domain.git_rev)}"
            branch.add(text((source, "dim")))
        if line.gates:
            failed = ", ".join(gate.name for gate in line.gates.failed)
            branch.add(
                text(("gates passed", "green") if line.gates.passed else (f"gates failed: {failed}", "bold red"))
            )
        if line.chained is False:
            branch.add(text(("its record names another digest than that of its parent", "bold red")))
        for entry in history.log:
            if entry.kind != "gates" and line.version in (entry.version, entry.to_version):
                branch.add(text((log_text(entry), "")))
    if not history.versions:
        tree.add(text(("no versions yet: register a base with `copal init DIR --base SOURCE`", "")))
    return tree
