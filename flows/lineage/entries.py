"""The log of a lineage: what happened to its versions after they were made, as a hash chain. Pure: knows no registry.

Gate results, promotions, rollbacks and withdrawals are entries. Each holds the digest of the one before it, and the
registry keeps number and digest of a new one in a tag, the anchor: whoever alters or drops an entry breaks the chain or
does not fit the anchor. The anchor is set after the entry is stored, so a few of the newest may not be anchored yet. An
entry is a plain JSON object and is never changed.
"""

from __future__ import annotations

import getpass
import json
import re
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
    "anchor_at",
    "anchor_of",
    "anchor_problems",
    "chain_problems",
    "champions",
    "gates_entry",
    "log_problems",
    "logged_alias",
    "next_entry",
    "not_anchored",
    "who_text",
    "writer",
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
    who: Mapping[str, str | None],
    version: int | None = None,
    from_version: int | None = None,
    to_version: int | None = None,
    why: str | None = None,
    details: Mapping[str, Any],
) -> dict[str, Any]:
    """The entry that follows `entries`, made now.

    Args:
        kind: one of `KINDS`.
        who: see `writer`.
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
        "who": who,
        "why": why,
        "version": version,
        "from": from_version,
        "to": to_version,
        "details": details,
    }
    return dict(json.loads(canonical_json(entry)))


def writer(role: str | None) -> dict[str, str | None]:
    """Who runs this process: {role, user, host}.

    Args:
        role: that the database knows the writer by; None where it knows none. User and host are only what the process
            says of itself.
    """
    return {"role": role, "user": _user(), "host": socket.gethostname()}


def who_text(who: Mapping[str, str | None]) -> str:
    """The `who` of an entry, for people."""
    person = f"{who['user']}@{who['host']}"
    return person if who["role"] is None else f"role {who['role']} ({person})"


def anchor_of(entries: Sequence[Entry]) -> str:
    """What the registry keeps of the log: the number and the digest of its newest entry; "" of an empty one."""
    return anchor_at(entries[-1]) if entries else ""


def anchor_at(entry: Entry) -> str:
    """The anchor of a log whose newest entry is `entry`."""
    return f"{entry['number']} {fingerprint(entry)}"


def anchor_problems(entries: Sequence[Any], anchor: str) -> list[str]:
    """Where the log does not fit its anchor, a line each; entries after the anchored one are no problem.

    Args:
        anchor: see `anchor_of`; "" where none was set yet.
    """
    number, digest = _parsed(anchor)
    if number is None:
        return [f"the anchor of the log in the registry is no number and digest but {anchor!r}: somebody altered it"]
    if number > len(entries):
        return [f"the log has {len(entries)} entries, its anchor in the registry names entry {number}: it was cut off"]
    if number and _digest(entries[number - 1]) != digest:
        return [f"log entry {number}: is not the one that the anchor in the registry names: one of the two was altered"]
    return []


def not_anchored(entries: Sequence[Any], anchor: str) -> int:
    """How many of the newest entries the anchor does not cover yet."""
    return max(0, len(entries) - (_parsed(anchor)[0] or 0))


def chain_problems(entries: Sequence[Any], valid: set[str] | None = None) -> list[str]:
    """What is wrong with a log in itself, a line each; nothing where it is whole. See `anchor_problems` for its end.

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
    return problems


def log_problems(entries: Sequence[Any], anchor: str, valid: set[str] | None = None) -> list[str]:
    """What is wrong with a log, a line each: see `chain_problems`; of one that is whole, see `anchor_problems`."""
    return chain_problems(entries, valid) or anchor_problems(entries, anchor)


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


def _parsed(anchor: str) -> tuple[int | None, str]:
    """Number and digest of an anchor: 0 of none, None of what is no anchor."""
    if not anchor:
        return 0, ""
    found = re.fullmatch(r"([1-9][0-9]{0,17}) ([0-9a-f]{64})", anchor)
    return (int(found[1]), found[2]) if found else (None, "")


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
