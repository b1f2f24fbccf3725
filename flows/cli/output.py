"""What commands print: results on standard output, one line for an error on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from flows.terminal.lines import write
from flows.terminal.progress import console, is_quiet

if TYPE_CHECKING:
    from rich.console import RenderableType

    from flows.project import Project
    from flows.registry.versions import ModelVersion

__all__ = ["hint", "print_json", "refuse", "say", "show", "show_versions"]


class _Plain(Protocol):
    """What knows itself as plain JSON values."""

    def as_json(self) -> dict[str, Any]: ...


_T = TypeVar("_T", bound="Mapping[str, Any] | _Plain")


def say(line: str) -> None:
    """Print a line of the result."""
    write(line)


def hint(line: str) -> None:
    """Print a line that `--quiet` leaves out: what goes on, or what to do next."""
    if not is_quiet():
        write(line)


def refuse(reason: str, code: int = 2) -> int:
    """Print why the command ends, as one line on standard error; gives its exit code."""
    write(f"copal: {' '.join(reason.split())}", sys.stderr)
    return code


def print_json(found: Mapping[str, Any]) -> None:
    """Print a result for programs."""
    import json

    write(json.dumps(found, indent=2))


def show(found: _T, as_json: bool, render: Callable[[_T], RenderableType]) -> None:
    """Print a result for programs, or as `render` draws it."""
    if as_json:
        print_json(found if isinstance(found, Mapping) else found.as_json())
    else:
        console().print(render(found))


def show_versions(project: Project, versions: Sequence[ModelVersion], tell: Callable[[str], None]) -> None:
    """Say what made each of the new versions, and show the domains of the last."""
    from flows.lineage.scores import scores
    from flows.project import read_history
    from flows.terminal.status import render_scores

    for version in versions:
        did = f"withdrew {version.withdrawn}" if version.withdrawn else f"adapted to {version.tags['copal.domain']}"
        tell(f"version {version.number} of {project.name}: {did}")
        step = project.registry.record(version).step
        if step is not None and (left := step.left_out):
            tell(
                f"{len(left)} of its documents were left out, since other domains have their text on the "
                f"other side: {len(left.calibration)} for calibration, {len(left.evaluation)} for evaluation"
            )
    console().print(render_scores(scores(read_history(project), str(versions[-1].number))))
