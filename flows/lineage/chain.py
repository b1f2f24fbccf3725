"""Whether a log is whole: its entries form a chain of digests, and its end fits the anchor that the registry keeps.

The registry keeps number and digest of a new entry in a tag, the anchor: whoever alters or drops an entry breaks the
chain or does not fit the anchor. The anchor is set after the entry is stored, so a few of the newest entries may not be
anchored yet.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from flows.lineage.entries import Entry, digest_of, parse_entry
from flows.lineage.fields import LineageError

__all__ = [
    "anchor_at",
    "anchor_of",
    "anchor_problems",
    "chain_problems",
    "entries_of",
    "log_problems",
    "not_anchored",
]


def entries_of(stored: Sequence[Any]) -> list[Entry]:
    """The entries of a log that was read as plain JSON; its chain is checked elsewhere, see `chain_problems`.

    Raises:
        LineageError: an entry is missing or damaged.
    """
    return [parse_entry(value, f"log entry {place}") for place, value in enumerate(stored, start=1)]


def anchor_of(entries: Sequence[Entry]) -> str:
    """What the registry keeps of the log: the number and the digest of its newest entry; "" of an empty one."""
    return anchor_at(entries[-1]) if entries else ""


def anchor_at(entry: Entry) -> str:
    """The anchor of a log whose newest entry is `entry`."""
    return f"{entry.number} {entry.digest}"


def anchor_problems(stored: Sequence[Any], anchor: str) -> list[str]:
    """Where the log does not fit its anchor, a line each; entries after the anchored one are no problem.

    Args:
        stored: the entries, or as they are stored.
        anchor: see `anchor_of`; "" where none was set yet.
    """
    number, digest = _parsed(anchor)
    if number is None:
        return [f"the anchor of the log in the registry is no number and digest but {anchor!r}: somebody altered it"]
    if number > len(stored):
        return [f"the log has {len(stored)} entries, its anchor in the registry names entry {number}: it was cut off"]
    if number and digest_of(stored[number - 1]) != digest:
        return [f"log entry {number}: is not the one that the anchor in the registry names: one of the two was altered"]
    return []


def not_anchored(stored: Sequence[Any], anchor: str) -> int:
    """How many of the newest entries the anchor does not cover yet."""
    return max(0, len(stored) - (_parsed(anchor)[0] or 0))


def chain_problems(stored: Sequence[Any]) -> list[str]:
    """What is wrong with a log in itself, a line each; nothing where it is whole. See `anchor_problems` for its end.

    Args:
        stored: the entries as they are stored: plain JSON, None for one that is missing.
    """
    problems = []
    before: str | None = None
    for place, value in enumerate(stored, start=1):
        follows, before = before, digest_of(value)
        if value is None:
            problems.append(f"log entry {place}: is missing")
            continue
        try:
            entry = parse_entry(value, f"log entry {place}")
        except LineageError as error:
            problems.append(str(error))
            continue
        if entry.number != place:
            problems.append(f"log entry {place}: says that it is number {entry.number}")
        if entry.previous != follows:
            problems.append(f"log entry {place}: does not follow the entry before it: one of the two was altered")
    return problems


def log_problems(stored: Sequence[Any], anchor: str) -> list[str]:
    """What is wrong with a log, a line each: see `chain_problems`; of one that is whole, see `anchor_problems`."""
    return chain_problems(stored) or anchor_problems(stored, anchor)


def _parsed(anchor: str) -> tuple[int | None, str]:
    """Number and digest of an anchor: 0 of none, None of what is no anchor."""
    if not anchor:
        return 0, ""
    found = re.fullmatch(r"([1-9][0-9]{0,17}) ([0-9a-f]{64})", anchor)
    return (int(found[1]), found[2]) if found else (None, "")
