"""Which dataset versions wait for their data, because nobody has pushed it yet, and when each is tried again.

This is kept in `.copal/waiting.json`, by model name and domain. It only saves tries: where the file is lost or damaged,
nothing waits, and the next check finds out again which data is missing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from copal.bounded import read_json
from copal.errors import CopalError
from copal.files import write_atomic
from flows.workspace import Workspace, make_private

__all__ = ["Waiting", "forget", "note_missing", "waiting"]

_LONGEST = 3600.0  # seconds between two tries


@dataclass(frozen=True, kw_only=True, slots=True)
class Waiting:
    """A dataset version without its data.

    Attributes:
        dvc_md5: of the dataset version.
        tries: how often its data was looked for.
        since: when it was first found missing; `next_try`: when it is looked for again.
    """

    dvc_md5: str
    tries: int
    since: datetime
    next_try: datetime

    def is_due(self, now: datetime) -> bool:
        """Whether to try again; a clock that was set back does not keep a dataset waiting."""
        return not self.since <= now < self.next_try

    def as_dict(self) -> dict[str, Any]:
        """As plain JSON; times in ISO 8601."""
        return {
            "dvc_md5": self.dvc_md5,
            "tries": self.tries,
            "since": self.since.isoformat(timespec="seconds"),
            "next_try": self.next_try.isoformat(timespec="seconds"),
        }


def waiting(workspace: Workspace, model: str) -> dict[str, Waiting]:
    """What waits in the lineage `model`, by domain."""
    domains = _read(workspace).get(model)
    entries = {domain: _entry(value) for domain, value in domains.items()} if isinstance(domains, dict) else {}
    return {domain: entry for domain, entry in entries.items() if entry is not None}


def note_missing(workspace: Workspace, model: str, domain: str, md5: str, interval: float, now: datetime) -> None:
    """Write down that the data of a dataset version was looked for and not found.

    The next try comes after `interval` seconds, then after twice that, and so on: an hour at most.
    """
    entries = waiting(workspace, model)
    known = entries.get(domain)
    tries, since = (known.tries + 1, known.since) if known and known.dvc_md5 == md5 else (1, now)
    pause = min(interval * 2.0 ** min(tries - 1, 64), _LONGEST)
    entries[domain] = Waiting(dvc_md5=md5, tries=tries, since=since, next_try=now + timedelta(seconds=pause))
    _write(workspace, model, entries)


def forget(workspace: Workspace, model: str, domain: str) -> None:
    """The domain does not wait any more."""
    entries = waiting(workspace, model)
    if entries.pop(domain, None) is not None:
        _write(workspace, model, entries)


def _path(workspace: Workspace) -> Path:
    return workspace.private / "waiting.json"


def _read(workspace: Workspace) -> dict[str, Any]:
    try:
        content = read_json(_path(workspace), CopalError)
    except CopalError:
        return {}
    return content if isinstance(content, dict) else {}


def _entry(value: Any) -> Waiting | None:
    try:
        return Waiting(
            dvc_md5=str(value["dvc_md5"]),
            tries=int(value["tries"]),
            since=datetime.fromisoformat(value["since"]).astimezone(UTC),
            next_try=datetime.fromisoformat(value["next_try"]).astimezone(UTC),
        )
    except (KeyError, TypeError, ValueError):
        return None


def _write(workspace: Workspace, model: str, entries: dict[str, Waiting]) -> None:
    content = _read(workspace) | {model: {domain: entry.as_dict() for domain, entry in entries.items()}}
    make_private(workspace)
    write_atomic(_path(workspace), json.dumps(content, indent=2, sort_keys=True) + "\n")
