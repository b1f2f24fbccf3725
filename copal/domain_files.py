"""The files of a domain's folder: which ones are read, and what may not lie there.

The folder may come from others. So nothing outside it is read, nothing that is no file is opened, and a name that could
tell a terminal what to do is named in ASCII and goes nowhere else.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from copal.errors import DataError

__all__ = ["ENDINGS", "TASKS", "DomainFile", "check_name", "domain_files"]

ENDINGS = (".txt", ".jsonl", ".parquet", ".txt.gz", ".txt.zst", ".jsonl.gz", ".jsonl.zst")
TASKS = "tasks"  # the folder of a domain with questions for a model and their answers: no text to prune or measure with

_MOST_FILES = 1_000_000
# Control characters, halves of surrogate pairs (what is not UTF-8), and marks that turn the direction of writing.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainFile:
    """A file with text in it.

    Attributes:
        folder: of the domain.
        name: the file's place in there, with `/`.
        size: in bytes, as stored.
    """

    folder: Path
    name: str
    size: int

    @property
    def path(self) -> Path:
        """Where to open it."""
        return self.folder / self.name

    @property
    def ending(self) -> str:
        """One of `ENDINGS`."""
        return next(ending for ending in ENDINGS if self.name.lower().endswith(ending))


def domain_files(folder: Path) -> list[DomainFile]:
    """The files under `folder` that hold text, in the order of their names. Other and hidden files are passed over, and
    so is the folder `tasks` in it.

    A link to a file in the folder is a file of its own; a link to a folder in there is passed over.

    Raises:
        DataError: the folder is missing, a link, or cannot be listed; or it holds a link that leaves it or leads
            nowhere, a pipe, socket or device, a name that is not UTF-8 or has control characters, or too many files.
    """
    if folder.is_symlink():
        raise DataError(f"domain folder {folder} is a link: name the folder that it points to, or put the files there")
    if not folder.is_dir():
        raise DataError(f"domain folder {folder} is not there, or is no folder")
    try:
        found = []
        for file in _walk(folder, os.path.realpath(folder)):
            found.append(file)
            if len(found) > _MOST_FILES:
                raise DataError(
                    f"domain folder {folder} holds more than {_MOST_FILES:,} files with text: "
                    "put the documents into .jsonl or .parquet files"
                )
    except OSError as error:
        raise DataError(f"domain folder {folder} cannot be listed: {error.strerror}") from error
    return sorted(found, key=lambda file: file.name)


def check_name(name: str, where: str) -> None:
    """Check the name of a file in `where`.

    Raises:
        DataError: it is not UTF-8, or has control characters; says so in ASCII.
    """
    if _UNSAFE.search(name):
        raise DataError(f"{where} holds {name!a}: the name is not UTF-8, or has control characters; rename it")


def _walk(folder: Path, root: str) -> Iterator[DomainFile]:
    waiting = [""]
    while waiting:
        inside = waiting.pop()
        with os.scandir(f"{root}/{inside}") as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                name = inside + entry.name
                check_name(name, str(folder))
                if entry.is_dir(follow_symlinks=False):
                    if name == TASKS:
                        continue
                    waiting.append(f"{name}/")
                    continue
                if entry.is_symlink():
                    _check_link(folder / name, root)
                    if entry.is_dir():
                        continue
                found = entry.stat()
                if not stat.S_ISREG(found.st_mode):
                    kind = _KINDS.get(stat.S_IFMT(found.st_mode), "no file")
                    raise DataError(f"{folder / name} is {kind}, and no file: remove it")
                if name.lower().endswith(ENDINGS):
                    yield DomainFile(folder=folder, name=name, size=found.st_size)


def _check_link(link: Path, root: str) -> None:
    target = os.path.realpath(link)
    if os.path.commonpath([target, root]) != root:
        raise DataError(
            f"{link} is a link that leaves the domain's folder: put the file itself there (DVC: `dvc config cache.type "
            "copy`, then `dvc checkout --relink`)"
        )
    if not Path(target).exists():
        raise DataError(f"{link} is a link to nothing: remove it, or put the file itself there")
