"""Durable files: what is there is whole."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = [
    "atomic_folder",
    "flush",
    "freed_bytes",
    "json_text",
    "locked",
    "locked_if_free",
    "move_into_place",
    "sha256_file",
    "write_atomic",
    "write_json",
]


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A new folder beside `target`, flushed and renamed to it on leaving; removed if an error leaves the `with`."""
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        move_into_place(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def move_into_place(partial: Path, target: Path) -> None:
    """Flush the folder `partial` and all that is in it, and rename it to `target`, which is not there or empty."""
    for path in sorted(partial.rglob("*")):
        flush(path)
    flush(partial)
    partial.rename(target)
    flush(target.parent)


def flush(path: Path) -> None:
    """Force a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, made if need be, alone; waits for whoever holds it, thread or process."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the kernel lets go of it when the process ends, however it ends
        yield


@contextmanager
def locked_if_free(path: Path) -> Iterator[bool]:
    """As `locked`, but nobody waits: gives False where somebody else holds it."""
    with path.open("a") as file:
        free = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        yield free


def sha256_file(path: Path) -> str:
    """SHA-256 (hexadecimal) of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def freed_bytes(folder: Path) -> int:
    """Bytes that deleting `folder` frees: a file with a second name elsewhere stays."""
    stats = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return sum(stat.st_size for stat in stats if stat.st_nlink == 1)


def write_atomic(path: Path, text: str, *, mode: int = 0o666) -> None:
    """Write `text` as UTF-8 to `path`, whole or not at all; replaces what is there.

    Args:
        mode: of the file, less the process's umask; for a secret 0o600, which it then has from the beginning.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.unlink(missing_ok=True)  # of a process that was killed: it would keep its mode
        partial.touch(mode)
        partial.write_text(text, encoding="utf-8")
        flush(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush(path.parent)


def json_text(value: Any) -> str:
    """The one spelling of a JSON file of copal's: indented, sorted keys, an end of line at the end; NaN is refused."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write `value` as `json_text`. Not atomic by itself: see `atomic_folder`."""
    path.write_text(json_text(value), encoding="utf-8")
