"""What a step takes, as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flows.lineage.figures import count, gigabytes, three_digits, timespan
from flows.terminal.tables import plain_table

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

__all__ = ["render_known", "render_sizes"]

_PARTS = {
    "statistics": "statistics (forward pass, second moments)",
    "way back": "way back (gradient of the loss)",
    "solve": "solve (conjugate gradient)",
    "report": "report (layer errors)",
    "evaluation": "evaluation",
    "files": "files, at 1 GB/s",
}


def render_sizes(found: Mapping[str, Any]) -> RenderableType:
    """`flows.models.sizes.sizes` for people."""
    from rich.console import Group
    from rich.text import Text

    return Group(Text(_heading(found)), _disk(found["disk"]), _memory(found), _time(found))


def render_known(found: Mapping[str, Any]) -> RenderableType:
    """`flows.models.sizes.known_sizes` for people: as a share of the 16-bit model."""
    numbers = ("parameters", "size", "full", "compact")
    table = plain_table("what one domain's statistics take of a 16-bit model", "model", *numbers, right=numbers)
    for name, size in found["models"].items():
        shares = (
            f"{gigabytes(size[storage])} ({size[storage] / size['model']:.3f})" for storage in ("full", "compact")
        )
        table.add_row(name, count(size["parameters"]), gigabytes(size["model"]), *shares)
    return table


def _heading(found: Mapping[str, Any]) -> str:
    settings = found["settings"]
    calibration = settings["calibration"]
    processes = f", {settings['processes']} processes" if settings["processes"] > 1 else ""
    return (
        f"{found['model']}: {count(found['parameters'])} parameters in {found['blocks']} blocks. A step with "
        f"{calibration['windows']} windows of {calibration['window_length']} tokens, batch {settings['batch']}, "
        f"criterion {settings['prune']['criterion']}, storage {calibration['storage']}, {settings['dtype']}, to a "
        f"version with {settings['domains']} domain{'s' if settings['domains'] > 1 else ''}{processes}:"
    )


def _disk(disk: Mapping[str, int]) -> Table:
    table = plain_table("disk", "", "size", "of the model", right=("size", "of the model"))
    rows = {
        "model": disk["model"],
        "statistics of the domain, kept": disk["contribution"],
        "running sum, of the newest version only": disk["total"],
        "all of the version": disk["version"],
        "hidden states, until the way back": disk["hidden"],
        "hidden states, to go on from after a kill": disk["newest"],
    }
    for name, size in rows.items():
        if size:
            table.add_row(name, gigabytes(size), f"{size / disk['model']:.3f}")
    return table


def _memory(found: Mapping[str, Any]) -> Table:
    memory = found["memory"]
    fits = [name for name, one in found["hardware"].items() if one["memory"] and memory["gpu"] <= one["memory"]]
    table = plain_table("memory, beside Python and its libraries", "", "at most", "", right=("at most",))
    table.add_row("without a GPU", gigabytes(memory["cpu"]), "")
    table.add_row("of each GPU", gigabytes(memory["gpu"]), f"fits {', '.join(fits)}" if fits else "fits none of them")
    table.add_row("beside the GPUs", gigabytes(memory["beside_gpu"]), "")
    return table


def _time(found: Mapping[str, Any]) -> Table:
    by_hardware = found["seconds"]
    numbers = ("operations", *by_hardware)
    table = plain_table("time, roughly: it may be half or twice as long", "", *numbers, right=numbers)
    for part in next(iter(by_hardware.values())):
        work = found["operations"].get(part)
        operations = f"{three_digits(sum(work.values()) / 1e12)} T" if work else ""
        table.add_row(_PARTS[part], operations, *(timespan(parts[part]) for parts in by_hardware.values()))
    table.add_section()
    table.add_row("all", "", *(timespan(sum(parts.values())) for parts in by_hardware.values()))
    return table
