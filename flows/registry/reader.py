"""What is read of the versions of one registered model in MLflow.

What is read is read once and kept, for one operation of one process, until `refresh`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flows.cache import Cache
from flows.lineage.record import Record
from flows.registry.artifacts import Artifacts
from flows.registry.errors import RegistryError
from flows.registry.remembered import look_once
from flows.registry.runs import shown_run
from flows.registry.store import Places, Store
from flows.registry.versions import LOG_HEAD, ModelVersion, Snapshot, linked, look, look_at_aliases

__all__ = ["RegistryReader"]

_BASE, _LOGGED = "copal.base_fingerprint", "copal.logged_model"


class RegistryReader:
    """The versions of one registered model, to be read.

    Reading never creates a store: where the SQLite file of `tracking_uri` is not there, there are no versions.
    """

    def __init__(self, places: Places, model_name: str, cache: Cache) -> None:
        """Nothing is opened yet.

        Args:
            places: MLflow's store, and where its artifacts go.
            model_name: registered model; the experiment has the same name.
            cache: for what is fetched from a remote artifact store.

        Raises:
            RegistryError: `model_name` cannot name a model.
        """
        self._store = Store(places, model_name)
        self._cache = cache
        self._artifacts = Artifacts(self._store, cache)
        self._seen: Snapshot | None = None

    @property
    def tracking_uri(self) -> str:
        """MLflow's store."""
        return self._store.places.tracking_uri

    @property
    def model_name(self) -> str:
        """The registered model: the name of the lineage."""
        return self._store.model_name

    # -- what there is

    def refresh(self) -> None:
        """Forget what was read: what others have written since is seen from here on."""
        self._seen = None

    def refresh_aliases(self) -> None:
        """Forget where the aliases were: one call less than to read it all anew.

        Raises:
            RegistryError: the store cannot be read.
        """
        if self._seen is None or not self._seen.there:
            return self.refresh()
        with self._store.client() as client:
            self._seen = look_at_aliases(self._store, client, self._seen)

    def _look(self) -> Snapshot:
        if not self._store.is_there:
            return Snapshot(there=False, every=(), aliases={}, tags={})
        if self._seen is None:
            self._seen = look_once(self._store.places, self.model_name, self._cache.folder, self._ask)
        return self._seen

    def _ask(self) -> Snapshot:
        with self._store.client() as client:
            return look(self._store, client)

    def head(self) -> ModelVersion | None:
        """The newest version, which `models:/<name>@latest` loads; None where there is none yet."""
        versions = self.versions()
        return versions[-1] if versions else None

    def root(self) -> ModelVersion | None:
        """The dense base; number 1, unless an earlier attempt to register it was withdrawn. Where somebody deleted that
        version in MLflow: what is left of it.

        Raises:
            RegistryError: nothing is left of it.
        """
        versions = self.versions()
        if not versions or versions[0].parent is None:
            return versions[0] if versions else None
        for version in self.deleted():
            if version.parent is None and version.tags.get(_BASE) == versions[0].tags[_BASE]:
                return version
        raise RegistryError(
            f"{self.model_name} has versions, and no dense base any more: somebody deleted its first version and its "
            "files; bring a copy of the registry back, or start a lineage under another model.name"
        )

    def versions(self) -> list[ModelVersion]:
        """All published versions, oldest first.

        Raises:
            RegistryError: the store cannot be opened or read.
        """
        return self._look().versions

    def version(self, number: int) -> ModelVersion:
        """The published version `number`.

        Raises:
            RegistryError: there is none.
        """
        versions = self.versions()
        for version in versions:
            if version.number == number:
                return version
        there = ", ".join(str(version.number) for version in versions) or "none"
        raise RegistryError(f"model {self.model_name} has no version {number}; versions: {there}")

    def deleted(self) -> list[ModelVersion]:
        """Versions that somebody deleted in MLflow, which keeps their files; oldest first.

        Raises:
            RegistryError: the store cannot be read.
        """
        there = {version.tags[_LOGGED] for version in self._look().every}
        with self._store.client() as client:
            return [version for version in linked(self._store, client) if version.tags[_LOGGED] not in there]

    def kept(self, number: int) -> ModelVersion:
        """The version `number`, or what is left of it where somebody deleted it in MLflow.

        Raises:
            RegistryError: there is none, and nothing is left.
        """
        found = [version for version in self.versions() if version.number == number]
        found += [] if found else [version for version in self.deleted() if version.number == number]
        return found[-1] if found else self.version(number)

    def resolve(self, wanted: str) -> ModelVersion:
        """The version that a user names, by its number or by an alias.

        Raises:
            RegistryError: there is none; names the aliases.
        """
        if wanted.isdecimal():
            return self.version(int(wanted))
        versions = self.versions()
        for version in versions:
            if wanted in version.aliases:
                return version
        aliases = sorted(alias for version in versions for alias in version.aliases)
        raise RegistryError(
            f"{self.model_name} has no version or alias {wanted!r}; aliases: {', '.join(aliases) or 'none'}"
        )

    # -- the files of a version

    def folder(self, version: ModelVersion) -> Path:
        """A local folder with the version's `model/`, `state/` and `lineage.json`; treat it as read-only.

        The artifacts themselves where they are on this machine (no copy), else a copy in the cache, verified.

        Raises:
            RegistryError: the artifacts are not there, or what was fetched is not what the record names.
        """
        return self._artifacts.folder(version)

    def checked_folder(self, version: ModelVersion, *parts: str) -> Path:
        """`folder`, after the files whose paths begin with `parts` were hashed: a step may build on them.

        Raises:
            RegistryError: as `folder`; or one of them is not what the record names.
            LineageError: as `record`.
        """
        return self._artifacts.checked_folder(version, parts)

    def record(self, version: ModelVersion) -> Record:
        """The version's lineage record, checked against the digest in the registry. Fetches no weights.

        Raises:
            LineageError: the record is damaged or was altered.
            RegistryError: it cannot be fetched.
        """
        return self._artifacts.record(version)

    @contextmanager
    def stored(self, version: ModelVersion, file: str | None = None) -> Iterator[Path]:
        """A folder with the version's artifacts as the store has them now, past any cache; nothing is checked.

        Args:
            file: the only one that is wanted.

        Raises:
            RegistryError: they cannot be fetched.
        """
        with self._artifacts.stored(version, file) as folder:
            yield folder

    # -- what the log says and MLflow shows

    def log_anchor(self) -> str:
        """What the registry keeps of the log: number and digest of its newest entry; "" where it keeps nothing."""
        return self._look().tags.get(LOG_HEAD, "")

    def alias(self, name: str) -> int | None:
        """The number of the version that an alias names; None where it names none.

        Raises:
            RegistryError: the store cannot be read.
        """
        return self._look().aliases.get(name)

    def run_is_deleted(self, version: ModelVersion) -> bool:
        """Whether somebody deleted the MLflow run that made a version, where it has figures and pictures.

        Raises:
            RegistryError: the store cannot be read.
        """
        with self._store.client() as client:
            return version.run_id is not None and shown_run(client, version) is None
