"""What several tests of the flows do with a workspace of a toy model: steps without Prefect, weights, masks, claims."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from copal.checkpoint import Checkpoint
from flows.ledger import LINEAGE
from flows.project import Project
from flows.step.run import Made, plain_tasks, run_step


def step(bench: Any, domain: str = "code") -> Made | None:
    """One step, at the watched branch."""
    return run_step(bench.project, domain, None, plain_tasks())


def weights(bench: Any, number: int) -> dict[str, torch.Tensor]:
    """The pruned linears of a version, as stored."""
    checkpoint = Checkpoint(bench.registry.folder(bench.registry.version(number)) / "model")
    return {name: t for name, t in checkpoint.read(checkpoint.names()).items() if "layers" in name and t.ndim == 2}


def other_masks(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The share of weights that are zero in one of the two and not in the other."""
    different = sum(int(((one[name] == 0) != (other[name] == 0)).sum()) for name in one)
    return different / sum(weight.numel() for weight in one.values())


def holder(project: Project, on: str = LINEAGE) -> dict[str, Any]:
    """Who holds the lineage or its aliases, or held them last, as the ledger's table has it."""
    with sqlite3.connect(_file(project)) as database:
        database.row_factory = sqlite3.Row
        return dict(
            database.execute("SELECT * FROM claims WHERE lineage = ? AND kind = ?", (project.name, on)).fetchone()
        )


def expire_claims(project: Project) -> None:
    """As if whoever holds the lineage or its aliases had been paused past the expiry."""
    with sqlite3.connect(_file(project)) as database:
        database.execute("UPDATE claims SET expires = 0")


@contextmanager
def altered_entry(project: Project, number: int, document: str | None) -> Iterator[None]:
    """A log entry with another text in the ledger's table, or gone; put back afterwards."""
    with sqlite3.connect(_file(project)) as database:
        row = database.execute("SELECT * FROM entries WHERE number = ?", (number,)).fetchone()
        if document is None:
            database.execute("DELETE FROM entries WHERE number = ?", (number,))
        else:
            database.execute("UPDATE entries SET document = ? WHERE number = ?", (document, number))
    try:
        yield
    finally:
        with sqlite3.connect(_file(project)) as database:
            database.execute("DELETE FROM entries WHERE number = ?", (number,))
            database.execute("INSERT INTO entries VALUES (?, ?, ?, ?)", row)


def documents(project: Project) -> list[str]:
    """The log entries as they are stored."""
    with sqlite3.connect(_file(project)) as database:
        return [text for (text,) in database.execute("SELECT document FROM entries ORDER BY number")]


def _file(project: Project) -> str:
    return project.ledger.uri.removeprefix("sqlite:///")
