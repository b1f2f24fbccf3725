"""The files of a version: found on this machine or fetched into a cache, checked, and parts of them deleted."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from copal.files import sha256_file
from flows.cache import Cache, fetched_once
from flows.lineage.files import verify_files
from flows.lineage.record import RECORD_FILE, LineageError, Record, read_record, write_record
from flows.registry.errors import RegistryError
from flows.registry.store import Store, flush_all
from flows.registry.versions import DROPPED, ModelVersion
from flows.uris import local_path

__all__ = ["Artifacts"]


class Artifacts:
    """The files of versions. Its contract: what it gives is what the version was registered with, but for `stored`."""

    def __init__(self, store: Store, cache: Cache) -> None:
        self._store, self._cache = store, cache
        self._records: dict[str, Record] = {}  # by digest, which is checked when one is read

    def folder(self, version: ModelVersion) -> Path:
        """See `Registry.folder`."""
        local = local_path(version.location)
        if local is not None:
            if not (local / RECORD_FILE).is_file():
                raise RegistryError(
                    f"version {version.number} of {self._store.model_name}: {local} has no {RECORD_FILE}; "
                    "its artifacts were moved or deleted, bring them back to this path"
                )
            return local
        target = self._cache.hold(self._name(version))
        if not target.is_dir():
            fetched_once(target, lambda partial: self._fetch(version, partial))
            self._cache.make_room()
        return target

    def _fetch(self, version: ModelVersion, partial: Path) -> Path:
        folder = self._store.download(version.location, partial, quiet=False)
        record = self._checked(version, folder / RECORD_FILE)
        differences = verify_files(record, folder, **version.dropped)
        if differences:
            raise RegistryError(
                f"version {version.number} of {self._store.model_name}: fetched from {version.location}, "
                f"but {differences[0]} ({len(differences)} such files); fetch it again"
            )
        flush_all(folder)
        return folder

    def keep(self, version: ModelVersion, folder: Path) -> None:
        """See `Registry.keep`."""
        if local_path(version.location) is not None:
            return
        target = self._cache.hold(self._name(version))
        flush_all(folder)
        fetched_once(target, lambda _: folder)
        self._cache.make_room()

    def checked_folder(self, version: ModelVersion, parts: tuple[str, ...]) -> Path:
        """See `RegistryReader.checked_folder`."""
        folder = self.folder(version)
        for name, digest in self.record(version).files.items():
            path = folder / name
            if name.startswith(parts) and not (path.is_file() and sha256_file(path) == digest):
                raise RegistryError(
                    f"version {version.number} of {self._store.model_name}: {path} is not what was registered: bring "
                    f"that back from a copy (`copal verify {version.number}` tells of all files)"
                )
        return folder

    def record(self, version: ModelVersion) -> Record:
        """See `Registry.record`."""
        if version.digest not in self._records:
            self._records[version.digest] = self._read_record(version)
        return self._records[version.digest]

    def _read_record(self, version: ModelVersion) -> Record:
        local = local_path(version.location)
        if local is not None:
            return self._checked(version, local / RECORD_FILE)
        whole = self._cache.folder / self._name(version) / RECORD_FILE
        if whole.is_file():
            return self._checked(version, whole)
        path = self._cache.folder / f"{self._name(version)}.json"
        if not path.is_file():
            with self._fetched(version, RECORD_FILE) as folder:
                write_record(path, self._checked(version, folder / RECORD_FILE))
        return self._checked(version, path)

    @contextlib.contextmanager
    def stored(self, version: ModelVersion, file: str | None = None) -> Iterator[Path]:
        """See `Registry.stored`."""
        local = local_path(version.location)
        if local is not None:
            yield local
            return
        with self._fetched(version, file) as folder:
            yield folder

    def size(self, version: ModelVersion, part: str) -> int:
        """The bytes that a folder of the version takes, in the store and in a copy of it in the cache."""
        size = sum(path.stat().st_size for folder in self._folders(version, part) for path in _files(folder))
        if local_path(version.location) is None:
            with self._store.client():
                listed = self._store.artifacts(version.location).list_artifacts(part)
            size += sum(file.file_size or 0 for file in listed)
        return size

    def drop(self, version: ModelVersion, part: str) -> None:
        """Delete a folder of the version, from the store and from the cache; tags say so first, see `Registry._drop`.

        Raises:
            RegistryError: the store does not let it be deleted.
        """
        assert part in DROPPED
        for folder in self._folders(version, part):
            if folder.exists():
                shutil.rmtree(folder)
        if local_path(version.location) is not None:
            return
        with self._store.client():
            remote = self._store.artifacts(version.location)
            with contextlib.suppress(NotImplementedError):
                remote.delete_artifacts(part)
            if remote.list_artifacts(part):  # some stores say nothing
                raise RegistryError(
                    f"the artifact store does not let copal delete {version.location}/{part}: "
                    "delete it with the store's own tools, or leave it there"
                )

    def _folders(self, version: ModelVersion, part: str) -> list[Path]:
        local = local_path(version.location)
        return [self._cache.folder / self._name(version) / part, *([] if local is None else [local / part])]

    def _name(self, version: ModelVersion) -> str:
        # The digest, for two stores may share a cache, and both have a version 1.
        return f"{self._store.model_name}-{version.number}-{version.digest[:16]}"

    @contextlib.contextmanager
    def _fetched(self, version: ModelVersion, file: str | None) -> Iterator[Path]:
        """A temporary folder in the cache with the version's artifacts, or with one file of them."""
        self._cache.folder.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".fetch-", dir=self._cache.folder))
        try:
            uri = version.location if file is None else f"{version.location.rstrip('/')}/{file}"
            got = self._store.download(uri, folder, quiet=file is not None)
            yield got if file is None else got.parent
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _checked(self, version: ModelVersion, path: Path) -> Record:
        record = read_record(path)
        if record.digest != version.digest:
            raise LineageError(
                f"{path}: is not the record that version {version.number} of {self._store.model_name} was registered "
                "with (its digest differs): it was altered, bring the original back"
            )
        return record


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())
