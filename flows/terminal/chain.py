"""The chain of versions as a tree for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flows.lineage.history import History, log_text, printable, summary

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = [
    "render_history",
]


_SHORT = 10  # characters of a hash for people


def render_history(history: History) -> RenderableType:
    """The chain for people: one branch a version, oldest first; below it its data, its gates, and its log entries."""
    from rich.text import Text
    from rich.tree import Tree

    def text(*parts: tuple[str, str]) -> Text:  # no string: rich would read [brackets] in it as markup
        return Text.assemble(*((printable(part), style) for part, style in parts), overflow="fold")

    tree = Tree(text((history["model"], "bold")))
    for line in summary(history):
        parts = [(f"version {line['version']}", "bold cyan"), (f"  {line['step']}", "bold")]
        if line["dvc_md5"]:
            parts.append((f"  {line['dvc_md5'][:_SHORT]}", "dim"))
        if line["perplexity"] is not None:
            ratio = line["perplexity"] / line["dense_perplexity"]
            parts.append((f"  perplexity {line['perplexity']:.2f} ({ratio:.2f} x dense)", ""))
        if line["sparsity"]:
            parts.append((f"  sparsity {line['sparsity']:.3f}", ""))
        if line["aliases"]:
            parts.append((f"  {', '.join(line['aliases'])}", "bold magenta"))
        branch = tree.add(text(*parts))
        if line["domain"]:
            source = f"data: {line['repository']} at {line['git_rev'][:_SHORT]}"
            branch.add(text((source, "dim")))
        if line["gates"]:
            failed = ", ".join(line["gates"]["failed"])
            branch.add(
                text(("gates passed", "green") if line["gates"]["passed"] else (f"gates failed: {failed}", "bold red"))
            )
        if line["chained"] is False:
            branch.add(text(("its record names another digest than that of its parent", "bold red")))
        for entry in history["log"]:
            if entry["kind"] != "gates" and line["version"] in (entry["version"], entry["to"]):
                branch.add(text((log_text(entry), "")))
    if not history["versions"]:
        tree.add(text(("no versions yet: register a base with `copal init DIR --base SOURCE`", "")))
    return tree
