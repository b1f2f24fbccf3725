"""The cache of a workspace: data and versions that were fetched. They can be fetched again, and so it is bounded."""

from __future__ import annotations

import fcntl
import os
import shutil
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from copal.files import flush, freed_bytes, locked, locked_if_free

__all__ = ["Cache", "fetched_once"]

_GB = 1e9


class Cache:
    """Folders by names that say what is in them, such as an md5 or a digest. Processes of one machine share them.

    Its contract: what was held stays as long as this object lives, and where the folders take more than the cache may
    hold, those go that were used least recently.
    """

    def __init__(self, folder: Path, size: float | None = None) -> None:
        """Nothing is made yet.

        Args:
            folder: where the folders lie.
            size: gigabytes (10^9 bytes) that they may take; None: any number.
        """
        self.folder, self._size = folder, size
        self._held: set[str] = set()
        self._marks = ExitStack()
        weakref.finalize(self, self._marks.close)

    def hold(self, name: str) -> Path:
        """The place of a folder, whether it is there or not; nobody makes room with it from here on."""
        mark = self.folder / f".{name}.used"
        if name not in self._held:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = self._marks.enter_context(mark.open("a"))
            fcntl.flock(file, fcntl.LOCK_SH)  # the kernel lets go of it when the process ends, however it ends
            self._held.add(name)
        os.utime(mark)
        return self.folder / name

    def make_room(self) -> None:
        """Delete the folders that were used least recently, until the rest is no larger than it may be. Those that
        somebody holds stay, whatever they take.
        """
        if self._size is None:
            return
        marks = {mark: self.folder / mark.name[1:].removesuffix(".used") for mark in self.folder.glob(".*.used")}
        sizes = {mark: freed_bytes(folder) for mark, folder in marks.items() if folder.is_dir()}
        over = sum(sizes.values()) - self._size * _GB
        for mark in sorted(sizes, key=lambda mark: mark.stat().st_mtime_ns):
            if over <= 0:
                return
            if _deleted(marks[mark], mark):
                over -= sizes[mark]


def _deleted(folder: Path, mark: Path) -> bool:
    """Delete a folder of a cache; False where somebody holds it."""
    with locked_if_free(mark) as free:
        if not free:
            return False
        with locked(_lock(folder)):
            partial = _partial(folder)
            if partial.exists():
                shutil.rmtree(partial)
            if folder.is_dir():
                folder.rename(partial)  # so that no moment is seen in which half of it is there
                shutil.rmtree(partial)
    return True


def fetched_once(target: Path, fetch: Callable[[Path], Path]) -> Path:
    """The folder `target`, fetched where it is missing: whole, or not there. Processes that want the same one wait for
    the first.

    Args:
        fetch: called with an empty folder beside `target`; gives the folder that becomes `target`.
    """
    partial = _partial(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(_lock(target)):
        if target.is_dir():  # another process was first
            return target
        if partial.exists():  # a process that was killed left it: whoever writes it holds the lock
            shutil.rmtree(partial)
        partial.mkdir()
        try:
            fetch(partial).rename(target)
            flush(target.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def _lock(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")
