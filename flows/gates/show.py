"""What MLflow shows of a version once its gates have run: the files among the artifacts of its run, its description."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from copal.files import write_json
from flows.lineage.description import version_description
from flows.lineage.fields import LineageError
from flows.lineage.history import History, find_version
from flows.lineage.page.page import render_page
from flows.lineage.pictures import draw_pictures
from flows.project import read_history

if TYPE_CHECKING:
    from flows.lineage.entries import GatesEntry
    from flows.project import Project
    from flows.registry.versions import ModelVersion

__all__ = ["show_gates"]

_COLUMNS = ("name", "passed", "value", "limit", "detail")


def show_gates(
    project: Project, version: ModelVersion, entry: GatesEntry, check: Callable[[], None] = lambda: None
) -> None:
    """Show a log entry with gate results on its version and on the run that made it, and the lineage as it is now.

    Args:
        check: called before anything is written; raises where somebody else has taken over.

    Raises:
        RegistryError: the registry fails.
    """
    with TemporaryDirectory(prefix="copal-") as scratch:
        folder = Path(scratch)
        _write_gates(folder, entry)
        description = None
        with suppress(LineageError):  # of an altered record; a gate has said so
            history = read_history(project)
            _write_lineage(folder, history, pictures=project.settings.registry.pictures)
            record = find_version(history, str(version.number)).record
            description = version_description(version.number, record, entry)
        check()
        project.registry.show_gates(version, entry, folder, description)


def _write_gates(folder: Path, entry: GatesEntry) -> None:
    """`gates.json`, as MLflow's own `log_table` writes tables."""
    rows = [[gate.as_json()[column] for column in _COLUMNS] for gate in entry.details.gates]
    write_json(folder / "gates.json", {"columns": _COLUMNS, "data": rows})


def _write_lineage(folder: Path, history: History, *, pictures: bool) -> None:
    (folder / "lineage.html").write_text(render_page(history), encoding="utf-8")
    if pictures:
        draw_pictures(history, folder)
