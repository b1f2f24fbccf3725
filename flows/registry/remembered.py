"""What was read of a registered model in an SQLite store, for as long as nobody has written to that store.

MLflow takes seconds to be imported. A look at a lineage that has not changed since the last one need not do that: the
database file says itself whether it has. SQLite counts the transactions in its header, and a journal beside the file
says that one is under way, or was when its process died.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from copal.files import write_atomic
from flows.registry.sqlite import sqlite_file
from flows.registry.store import Places
from flows.registry.versions import ModelVersion, Snapshot

__all__ = ["look_once"]

_FORM = 1  # of what is kept: another one is as good as nothing
_HEADER = 100  # bytes, https://www.sqlite.org/fileformat.html: the count is in 24-28, its validity in 92-96
_WRITE_VERSION = 18  # 2: a write-ahead log, in which transactions do not show in the header
_WAL = 2


def look_once(places: Places, model_name: str, folder: Path, look: Callable[[], Snapshot]) -> Snapshot:
    """What `look` gives, or gave when the store was as it is now.

    Args:
        folder: where it is kept; one that cannot be written is no error.
    """
    before = _state(places)
    if before is None:
        return look()
    file = folder / f"{model_name}.seen.json"
    key = [_FORM, places.tracking_uri, str(places.artifact_root), before]
    kept = _kept(file, key)
    if kept is not None:
        return kept
    found = look()
    if _state(places) == before:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(file, json.dumps({"key": key, "snapshot": asdict(found)}))
        except OSError:
            pass
    return found


def _state(places: Places) -> list[int | str] | None:
    """What changes with every transaction; None where there is no such thing."""
    database = sqlite_file(places.tracking_uri)
    if database is None:
        return None
    try:
        with database.open("rb") as file:
            header, found = file.read(_HEADER), database.stat()
        if database.with_name(f"{database.name}-journal").exists():
            return None
    except OSError:
        return None
    if len(header) < _HEADER or header[_WRITE_VERSION] == _WAL:
        return None
    return [found.st_ino, found.st_mtime_ns, found.st_size, header[24:28].hex(), header[92:96].hex()]


def _kept(file: Path, key: list[object]) -> Snapshot | None:
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["key"] != key:
            return None
        found = kept["snapshot"]
        every = tuple(ModelVersion(**{**each, "aliases": tuple(each["aliases"])}) for each in found["every"])
        return Snapshot(there=found["there"], every=every, aliases=found["aliases"], tags=found["tags"])
    except (OSError, ValueError, KeyError, TypeError):  # not there, or damaged
        return None
