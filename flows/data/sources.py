"""A user's files as the folder of a domain: text files as they are, other tables and saved datasets as Parquet."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from copal.domain_files import ENDINGS, TASKS, domain_files
from copal.errors import DataError, one_line

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["gather"]

_TABLES = (".arrow", ".csv", ".json", ".tsv")
_SAVED = ("dataset_dict.json", "state.json")  # what `Dataset.save_to_disk` writes


def gather(paths: Sequence[Path], folder: Path) -> None:
    """Copy what is to be a domain into the new folder `folder`.

    Of one folder what is in it, `tasks` too; of several paths each under its own name. `.csv`, `.tsv`, `.json` and
    `.arrow` files, and folders that `datasets` saved, become Parquet with the same columns. Files of other kinds are
    passed over in a folder, and refused by name.

    Raises:
        DataError: a path is not there, is no text that copal reads, two have one name, or there is nothing to read.
    """
    folder.mkdir(parents=True)
    for path in paths:
        whole = len(paths) == 1 and path.is_dir()
        _take(path, folder if whole else _free(folder / path.name, path))
        if whole and (path / TASKS).is_dir():
            shutil.copytree(path / TASKS, folder / TASKS, symlinks=True)
    if not any(folder.rglob("*")):
        names = ", ".join(map(str, paths))
        raise DataError(f"{names} holds nothing to read: {', '.join((*ENDINGS, *_TABLES))} files, or a saved dataset")


def _take(path: Path, target: Path) -> None:
    name = path.name.lower()
    if path.is_dir() and any((path / saved).is_file() for saved in _SAVED):
        _convert(path, lambda _: _saved(path), target if target.is_dir() else target.parent, path.name)
    elif path.is_dir():
        for file in domain_files(path):
            _copy(file.path, target / file.name)
    elif path.is_file() and name.endswith(ENDINGS):
        _copy(path, target)
    elif path.is_file() and name.endswith(_TABLES):
        _convert(path, lambda scratch: {"": _table(path, scratch)}, target.parent, path.stem)
    elif path.exists():
        raise DataError(f"{path} is no text that copal reads: {', '.join((*ENDINGS, *_TABLES))}, or a folder of these")
    else:
        raise DataError(f"{path} is not there")


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _free(target: Path, path: Path) -> Path:
    if target.exists():
        raise DataError(f"{path}: another of the paths has the name {target.name} too; put them into one folder")
    return target


def _convert(path: Path, read: Callable[[str], dict[str, Dataset]], folder: Path, name: str) -> None:
    """Write what `read` gives (split -> rows) as Parquet into `folder`."""
    import datasets
    import pyarrow

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    with TemporaryDirectory() as scratch:
        try:
            for split, rows in read(scratch).items():
                target = folder / f"{'-'.join(filter(None, (name, split)))}.parquet"
                rows.to_parquet(_free(target, path))
        except (datasets.exceptions.DatasetsError, pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
            raise DataError(f"{path} cannot be read: {one_line(error.__cause__ or error)}") from error


def _table(path: Path, scratch: str) -> Dataset:
    from datasets import Dataset

    kind = path.suffix.lower()
    if kind == ".arrow":
        return Dataset.from_file(str(path))
    if kind == ".json":
        return Dataset.from_json(str(path), cache_dir=scratch)
    return Dataset.from_csv(str(path), cache_dir=scratch, sep="\t" if kind == ".tsv" else ",")


def _saved(path: Path) -> dict[str, Dataset]:
    from datasets import DatasetDict, load_from_disk

    found = load_from_disk(str(path))
    return dict(found.items()) if isinstance(found, DatasetDict) else {"": found}
