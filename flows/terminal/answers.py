"""Answers to an auditor's questions, for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flows.lineage.figures import figure
from flows.terminal.tables import plain_table

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = [
    "render_answer",
]


def render_answer(answer: Mapping[str, Any]) -> RenderableType:
    """An answer for people."""
    from rich.console import Group
    from rich.text import Text

    lines: list[RenderableType] = []

    def say(line: str) -> None:
        lines.append(Text(line))

    def show(headings: tuple[str, ...], rows: list[tuple[object, ...]]) -> None:
        if rows:
            table = plain_table(None, *headings)
            for row in rows:
                table.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
            lines.append(table)

    {"used": _show_used, "data": _show_data, "diff": _show_diff, "worse": _show_worse, "whose": _show_whose}[
        answer["question"]
    ](answer, say, show)
    return Group(*lines)


_Say = Callable[[str], None]


_Show = Callable[[tuple[str, ...], list[tuple[object, ...]]], None]


def _show_used(answer: Mapping[str, Any], say: _Say, show: _Show) -> None:
    if not answer["spells"]:
        say(f"no version holds {answer['dataset']}")
        return
    say(f"{answer['dataset']} is in {_numbers(answer['versions'])}")
    rows: list[tuple[object, ...]] = [
        (
            spell["domain"],
            spell["dvc_md5"],
            spell["came_in"],
            _numbers(spell["versions"]),
            "in the newest version" if spell["how"] is None else f"{spell['how']} in version {spell['left_in']}",
        )
        for spell in answer["spells"]
    ]
    show(("domain", "md5", "came in", "held by", "then"), rows)


def _show_data(answer: Mapping[str, Any], say: _Say, show: _Show) -> None:
    when = f" at {answer['on']}" if answer["on"] else " now"
    if answer["version"] is None:
        say(f"{answer['wanted']}{when}: no version (none had been promoted)")
    else:
        since = f", since {answer['since']}" if answer["since"] else ""
        say(f"{answer['wanted']}{when}: version {answer['version']}{since}")
        if not answer["domains"]:
            say("no data: it is the dense base, or all was withdrawn")
    show(
        ("domain", "md5", "repository", "revision", "tokens"),
        [(d["name"], d["dvc_md5"], d["repository"], d["git_rev"], d["tokens"]) for d in answer["domains"]],
    )
    for move in answer["moves"]:
        before = "none" if move["from"] is None else f"version {move['from']}"
        say(f"that day, at {move['when']}: from {before} to version {move['to']}")
    for gone in answer["withdrawn"]:
        say(f"withdrawn: {gone['name']} at {gone['dvc_md5']}")


def _show_diff(answer: Mapping[str, Any], say: _Say, show: _Show) -> None:
    say(f"from version {answer['a']} to version {answer['b']}")
    domains = answer["domains"]
    rows: list[tuple[object, ...]] = []
    rows += [("added", one["domain"], "", one["dvc_md5"]) for one in domains["added"]]
    rows += [("removed", one["domain"], one["dvc_md5"], "") for one in domains["removed"]]
    rows += [("replaced", one["domain"], one["a"], one["b"]) for one in domains["replaced"]]
    rows += [("weight", one["domain"], one["a"], one["b"]) for one in domains["reweighted"]]
    for section, changes in answer["changes"].items():
        rows += [(section, change["name"], change["a"], change["b"]) for change in changes]
    show(("what", "name", f"version {answer['a']}", f"version {answer['b']}"), rows)
    show(
        ("perplexity", f"version {answer['a']}", f"version {answer['b']}", "change"),
        [
            (
                one["domain"],
                figure(one["a"], nothing=""),
                figure(one["b"], nothing=""),
                _percent(one["change"])
                if one["comparable"]
                else ("other tokens" if None not in (one["a"], one["b"]) else ""),
            )
            for one in answer["perplexity"]
        ],
    )
    say("files of the two versions: " + ", ".join(f"{count} {name}" for name, count in answer["files"].items()))
    show(("changed", "files", "why"), [(one["part"], one["files"], one["why"]) for one in answer["parts"]])


def _show_worse(answer: Mapping[str, Any], say: _Say, show: _Show) -> None:
    worse = sum(one["change"] > 0 for one in answer["domains"])
    count = len(answer["domains"])
    say(
        f"{worse} of {count} dataset{'s' * (count != 1)} got worse since the version that adapted to them: "
        "perplexity on the same windows, a change above 0 is worse"
    )
    show(
        ("domain", "from", "when newest", "last in", "perplexity", "change", "most by the step of"),
        [
            (
                one["domain"],
                f"v{one['newest_in']}",
                figure(one["perplexity_when_newest"]),
                f"v{one['version']}",
                figure(one["perplexity"]),
                _percent(one["change"]),
                f"v{one['worst']['version']} ({one['worst']['step']}), {_percent(one['worst']['change'])}"
                if one["worst"]
                else "",
            )
            for one in answer["domains"]
        ],
    )
    for one in answer["domains"]:
        if one["not_comparable"]:
            say(f"{one['domain']}: {_numbers(one['not_comparable'])} was measured on other tokens and does not compare")


def _show_whose(answer: Mapping[str, Any], say: _Say, show: _Show) -> None:
    form = "the model of" if answer["form"] == "exported" else "all of"
    if answer["versions"]:
        say(f"these are, byte by byte, {form} {_numbers(answer['versions'])}")
        return
    if answer["closest"] is None:
        say("these are no version's files: not one is in a record")
        return
    count = len(answer["differences"])
    say(f"these are no version's files; closest is {form} version {answer['closest']}, {count} differ:")
    for difference in answer["differences"]:
        say(f"  {difference}")


def _numbers(numbers: Sequence[int]) -> str:
    return f"version{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:+.1%}"
