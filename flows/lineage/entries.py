"""The log of a lineage: what happened to its versions after they were made, as a hash chain. Pure: knows no registry.

Gate results, promotions, rollbacks and withdrawals are entries. Each holds the digest of the one before it, and the
registry keeps the digest of the newest in a tag: whoever alters, drops or adds an entry breaks the chain or its anchor.
An entry is a plain JSON object and is never changed.
"""

from __future__ import annotations

import getpass
import json
import socket
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from copal.config import canonical_json, fingerprint
from flows.lineage.schema import problem_with

__all__ = [
    "CHALLENGER",
    "CHAMPION",
    "KINDS",
    "SCHEMA",
    "alias_moves",
    "anchor_of",
    "chain_problems",
    "champions",
    "gates_entry",
    "logged_alias",
    "next_entry",
]

SCHEMA = "copal.log/1"
KINDS = ("gates", "promotion", "rollback", "withdrawal", "purge")
CHAMPION, CHALLENGER = "champion", "challenger"  # the aliases that the log tells of
_MOVES = ("promotion", "rollback")

Entry = Mapping[str, Any]


def next_entry(
    entries: Sequence[Mapping[str, Any]],
    *,
    kind: str,
    version: int | None = None,
    from_version: int | None = None,
    to_version: int | None = None,
    why: str | None = None,
    details: Mapping[str, Any],
) -> dict[str, Any]:
    """The entry that follows `entries`, made now by who runs this process.

    Args:
        kind: one of `KINDS`.
        version: that it is about; `from_version`, `to_version`: of an alias that moved.
        why: in the words of who did it.
        details: of the kind, as plain JSON.
    """
    assert kind in KINDS
    entry = {
        "schema": SCHEMA,
        "number": len(entries) + 1,
        "previous": fingerprint(entries[-1]) if entries else None,
        "kind": kind,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "who": f"{_user()}@{socket.gethostname()}",
        "why": why,
        "version": version,
        "from": from_version,
        "to": to_version,
        "details": details,
    }
    return dict(json.loads(canonical_json(entry)))


def anchor_of(entries: Sequence[Mapping[str, Any]]) -> str:
    """What the registry keeps of the log: the number and the digest of its newest entry; "" of an empty one."""
    return f"{len(entries)} {fingerprint(entries[-1])}" if entries else ""


def chain_problems(entries: Sequence[Any], anchor: str, valid: set[str] | None = None) -> list[str]:
    """What is wrong with a log, a line each; nothing where it is whole and ends at its anchor.

    Args:
        valid: digests of entries whose structure was found to be right before; those that are found so are added.
    """
    problems = []
    valid = set() if valid is None else valid
    before: str | None = None
    for place, entry in enumerate(entries, start=1):
        follows, before = before, _digest(entry)
        if before is None or before not in valid:
            problem = problem_with(entry, SCHEMA) if entry is not None else "is missing"
            if problem or before is None:
                problems.append(f"log entry {place}: {problem}")
                continue
            valid.add(before)
        if entry["number"] != place:
            problems.append(f"log entry {place}: says that it is number {entry['number']}")
        if entry["previous"] != follows:
            problems.append(f"log entry {place}: does not follow the entry before it: one of the two was altered")
    if not problems and anchor != anchor_of(entries):
        problems.append(f"the log has {len(entries)} entries and does not end where the registry says ({anchor!r})")
    return problems


def gates_entry(entries: Sequence[Entry], version: int, digest: str) -> Entry | None:
    """The newest entry with gate results of the version with this number and record; None where there is none."""
    found = [entry for entry in entries if entry["kind"] == "gates" and entry["version"] == version]
    return next((entry for entry in reversed(found) if entry["details"].get("record") == digest), None)


def alias_moves(entries: Sequence[Entry], alias: str) -> list[Entry]:
    """The entries of the log that move an alias; none where the log tells nothing of it."""
    if alias == CHALLENGER:
        return [entry for entry in entries if entry["kind"] == "gates" and entry["from"] != entry["to"]]
    return [entry for entry in entries if entry["kind"] in _MOVES and alias == CHAMPION]


def logged_alias(entries: Sequence[Entry], alias: str) -> int | None:
    """The version that an alias should name, by the log."""
    moves = alias_moves(entries, alias)
    return moves[-1]["to"] if moves else None


def champions(entries: Sequence[Entry]) -> list[int]:
    """The champion by the log and before it those that a rollback goes back to, the nearest last."""
    stack: list[int] = []
    for entry in alias_moves(entries, CHAMPION):
        before, to = entry["from"], entry["to"]
        if entry["kind"] == "rollback":
            while stack and stack[-1] != to:
                stack.pop()
        elif before is not None and stack[-1:] != [before]:  # set by hand, and gone on from by force
            stack.append(before)
        if stack[-1:] != [to]:
            stack.append(to)
    return stack


def _digest(entry: Any) -> str | None:
    """None of one that is missing, and of NaN."""
    try:
        return None if entry is None else fingerprint(entry)
    except ValueError:
        return None


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container with a user that has no name
        return "unknown"
