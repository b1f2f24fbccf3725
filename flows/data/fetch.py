"""The data of a dataset version: fetched from DVC's cache or remote, hashed anew, and kept in the workspace's cache."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Container
from pathlib import Path
from typing import Any

from copal.domain_files import check_name
from copal.errors import one_line
from copal.files import flush, freed_bytes, locked
from flows.cache import Cache, fetched_once
from flows.data.commits import git_root
from flows.data.dataset import DatasetError, DatasetVersion, MissingDataError
from flows.data.dvc import dvc_errors, open_dvc
from flows.data.repositories import data_root, has_commit, place_of
from flows.outages import outages
from flows.settings import WatchSettings
from flows.workspace import Workspace, make_private

__all__ = [
    "check_stored",
    "drop_copies",
    "fetch",
    "fetch_version",
    "listed_here",
    "scratch_folders",
]


_SCRATCH = "verify-"


def fetch(repo: Path, version: DatasetVersion, cache: Path, *, remote_only: bool = False) -> Path:
    """A folder with the data of `version`: `cache/<md5>`, fetched from DVC's cache or remote, checked, then renamed.

    Every file is hashed anew, and the hash of the folder is computed from those, so what is returned is what the
    pointer names, whatever a DVC cache holds. A folder that is there already is used as it is: only the rename that
    ends a fetch makes it, so it is whole. Processes that want the same version wait for the first.

    Args:
        remote_only: do not read DVC's cache where the repository has a default remote.

    Raises:
        MissingDataError: a file is neither in DVC's cache nor on a remote that answers and lets us in.
        DatasetError: a file is not what the pointer says, or DVC cannot read the repository at the version's commit.
        DataError: the name of a file is not UTF-8, or has control characters.
    """
    _check_md5(version)
    if (cache / version.md5).is_dir():
        return cache / version.md5
    root = git_root(repo)
    try:
        return fetched_once(
            cache / version.md5, lambda partial: _fetch(root, version, partial, remote_only=remote_only)
        )
    except OSError as error:
        raise DatasetError(f"cannot fetch {version.path} into {cache}: {one_line(error)}") from error


def _check_md5(version: DatasetVersion) -> None:
    if not re.fullmatch(r"[0-9a-f]{32}\.dir", version.md5):  # it becomes a path
        raise DatasetError(f"{version.path}: {version.md5!r} is not the md5 of a folder that DVC tracks")


def _fetch(root: Path, version: DatasetVersion, partial: Path, *, remote_only: bool) -> Path:
    files = partial / "files"
    _download(root, version, files, scratch=partial / "dvc", remote_only=remote_only)
    return files


def _download(root: Path, version: DatasetVersion, files: Path, *, scratch: Path, remote_only: bool) -> None:
    from dvc.api import DVCFileSystem
    from dvc_data.index import DataIndexDirError

    where = f"{version.path} at commit {version.git_rev[:10]}"

    def missing(why: str = "") -> MissingDataError:
        return MissingDataError(
            f"the pointer of {where} names md5 {version.md5}, but its data is neither in DVC's cache nor on a remote "
            f"that answers{f' ({why})' if why else ''}: run `dvc push` where the data is"
        )

    with dvc_errors(f"DVC cannot read {where}"), open_dvc(root, version.git_rev, scratch, remote_only) as dvc:
        try:
            listed = _listing(dvc, version)
            if any(part in ("", ".", "..") for name in listed for part in name.split("/")):
                raise DatasetError(f"{where} lists a file outside its folder; nothing was fetched")
            for name in listed:
                check_name(name, version.path)
            DVCFileSystem(dvc).get(version.path, str(files), recursive=True)
        except DataIndexDirError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise missing() from error
            if isinstance(error.__cause__, outages()):
                raise missing(one_line(error.__cause__ or error)) from error
            if isinstance(error.__cause__, UnicodeEncodeError):
                check_name(error.__cause__.object, version.path)
            raise DatasetError(
                f"DVC cannot list {where} (md5 {version.md5}): {one_line(error.__cause__ or error)}"
            ) from error
        except FileNotFoundError as error:
            raise missing() from error
        except outages() as error:
            raise missing(one_line(error)) from error
        except RecursionError as error:
            raise DatasetError(f"{where} (md5 {version.md5}) lists folders within folders without end") from error
    files.mkdir(exist_ok=True)  # a dataset without files
    _verify(version, files, listed)


def _listing(dvc: Any, version: DatasetVersion) -> dict[str, Any]:
    """{path in the folder: hash} as the .dir object in DVC's cache or remote says; empty where git keeps the files."""
    key = tuple(version.path.split("/"))
    index = dvc.index.data["repo"]
    entries = index.iteritems(prefix=key) if index.has_node(key) else ()
    return {"/".join(path[len(key) :]): entry.hash_info for path, entry in entries if entry.hash_info and path != key}


def listed_here(workspace: Workspace, watch: WatchSettings, version: DatasetVersion) -> list[str] | None:
    """Paths of the files of a dataset version in its folder, as DVC's cache lists them; None where it does not. No
    remote is asked.

    Raises:
        DatasetError: as `data_root`.
    """
    from dvc.exceptions import DvcException
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_data.hashfile.tree import Tree
    from dvc_objects.errors import ObjectFormatError

    root = git_root(root_of(workspace, watch, version))
    with tempfile.TemporaryDirectory() as scratch, open_dvc(root, version.git_rev, Path(scratch)) as dvc:
        try:
            tree = Tree.load(dvc.cache.local, HashInfo("md5", version.md5))
        except (DvcException, ObjectFormatError, OSError):
            return None
    return ["/".join(key) for key, _, _ in tree]


def _verify(version: DatasetVersion, files: Path, listed: dict[str, Any]) -> None:
    from dvc_data.hashfile.hash import fobj_md5
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_data.hashfile.tree import Tree

    tree = Tree()
    for path in sorted(files.rglob("*")):
        if path.is_dir():
            flush(path)
            continue
        name = path.relative_to(files).as_posix()
        wanted = listed.get(name)
        algorithm = wanted.name if wanted else "md5"  # pointers of DVC 2: md5-dos2unix, with Unix line ends in text
        with path.open("rb") as file:
            md5 = fobj_md5(file, name=algorithm)
            os.fsync(file.fileno())
        if wanted and md5 != wanted.value:
            raise DatasetError(
                f"{version.path}/{name} at commit {version.git_rev[:10]} is damaged: DVC lists md5 {wanted.value}, the "
                f"file has {md5}: remove {wanted.value[:2]}/{wanted.value[2:]} from DVC's cache and `dvc fetch` it"
            )
        tree.add(tuple(name.split("/")), None, HashInfo(algorithm, md5))
    flush(files)
    tree.digest()
    if tree.oid != version.md5:
        raise DatasetError(
            f"{version.path} at commit {version.git_rev[:10]} is damaged: the pointer names md5 {version.md5}, the "
            f"files of DVC's listing have {tree.oid}: remove {version.md5[:2]}/{version.md5[2:]} from DVC's cache and "
            "`dvc fetch` it"
        )


def fetch_version(cache: Cache, workspace: Workspace, watch: WatchSettings, version: DatasetVersion) -> Path:
    """`fetch` into the workspace's cache, from the repository that has the version's commit: of the settings, the
    workspace, or the record. A lineage may know data of a repository that the settings no longer name.

    Raises:
        DatasetError: as `fetch` and `data_root`.
    """
    _check_md5(version)
    make_private(workspace)
    target = cache.hold(version.md5)
    if target.is_dir():  # then no repository is asked, and none has to answer
        return target
    fetch(root_of(workspace, watch, version), version, cache.folder)
    cache.make_room()
    return target


def check_stored(workspace: Workspace, watch: WatchSettings, version: DatasetVersion) -> None:
    """Fetch a version anew, from DVC's remote where one is set, hash it, and delete it. Only for who holds the
    workspace's lock.

    Raises:
        MissingDataError: the data is not there any more.
        DatasetError: it is not what the md5 says, or as `fetch` and `data_root`.
    """
    make_private(workspace, workspace.cache)
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=workspace.cache) as scratch:
        fetch(root_of(workspace, watch, version), version, Path(scratch), remote_only=True)


def scratch_folders(cache: Path) -> list[Path]:
    """Folders of `check_stored` that killed processes left behind. Only for who holds the workspace's lock."""
    return sorted(cache.glob(f"{_SCRATCH}*"))


def drop_copies(cache: Path, keep: Container[str]) -> int:
    """Delete fetched data but that with the md5s in `keep`, and what killed processes left half fetched. What a step
    still wants of it is fetched again. Only for who holds the workspace's lock.

    Returns:
        The bytes it took.
    """
    freed = 0
    for folder in scratch_folders(cache):
        freed += freed_bytes(folder)
        shutil.rmtree(folder)
    for folder in sorted(cache.glob("*.dir")) + sorted(cache.glob(".*.dir.partial")):
        md5 = folder.name.removeprefix(".").removesuffix(".partial")
        with locked(cache / f".{md5}.lock"):  # else somebody fetches into it
            if md5 not in keep or folder.name != md5:
                freed += freed_bytes(folder)
                shutil.rmtree(folder)
    return freed


def root_of(workspace: Workspace, watch: WatchSettings, version: DatasetVersion) -> Path:
    in_use, named = place_of(workspace, watch.repository), place_of(workspace, version.repository)
    for root in (in_use, workspace.root, named):
        if has_commit(root, version.git_rev):
            return root
    # The login is only in the settings.
    return data_root(workspace, watch if named == in_use else WatchSettings(repository=version.repository))
