"""The versions of one registered model in MLflow. A registered model name is one lineage.

What is read is read once and kept, for one operation of one process: a `Registry` is opened for each. Its own writes
are seen at once; what others write is seen after `refresh`, which whoever takes the lineage or its aliases calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from flows.cache import Cache
from flows.lineage.entries import GatesEntry
from flows.lineage.files import CONTRIBUTION_FOLDER, SUM_FOLDER
from flows.lineage.record import Record
from flows.lineage.signing import check_key
from flows.registry.errors import AliasMovedError, LineageConflictError, RegistryError
from flows.registry.probe import try_artifacts
from flows.registry.publish import adopt, check_base, check_head, publish, sealed_files, sweep
from flows.registry.reader import RegistryReader
from flows.registry.runs import log_gates, shown_run
from flows.registry.store import Places
from flows.registry.versions import DROPPED, GATES, LOG_ENTRY, LOG_HEAD, ModelVersion

if TYPE_CHECKING:
    from flows.settings import Settings
    from flows.workspace import Workspace

__all__ = ["Registry", "open_registry"]


def open_registry(workspace: Workspace, settings: Settings, cache: Cache) -> Registry:
    """The registry that the settings name; nothing is opened before the first call."""
    places = Places(
        workspace.registry_uri(settings), workspace.artifact_root(settings), workspace.artifact_location(settings)
    )
    return Registry(places, settings.model.name, cache, workspace.path(settings.signing.key))


class Registry(RegistryReader):
    """The versions of one registered model; new ones, aliases and what MLflow shows are written here."""

    def __init__(self, places: Places, model_name: str, cache: Cache, key: Path | None = None) -> None:
        """As the reader's.

        Args:
            key: the private key that new versions are signed with; None: they are not.
        """
        super().__init__(places, model_name, cache)
        self._key = key

    def try_artifacts(self) -> str | None:
        """See `flows.registry.probe.try_artifacts`."""
        return try_artifacts(self._store)

    def lineages(self) -> list[Registry]:
        """Every lineage of the store, by name, this one included where it has versions.

        What others registered has no versions of copal's, and so is no lineage.

        Raises:
            RegistryError: the store cannot be read.
        """
        if not self._store.is_there:
            return []
        names = self._store.model_names()
        others = [Registry(self._store.places, name, self._cache, self._key) for name in names]
        return [other for other in others if other.head() is not None]

    # -- what a version keeps

    def drop_sum(self, version: ModelVersion, *, dry_run: bool = False) -> int:
        """Delete the running sum in the state of `version`; a step that needs it makes it again from contributions.

        Returns:
            The bytes it takes, in the store or in a copy of it in the cache; 0 where there is none.

        Raises:
            RegistryError: the store does not let it be deleted.
        """
        return self._drop(version, SUM_FOLDER, dry_run)

    def drop_contribution(self, version: ModelVersion) -> int:
        """Delete what the state of `version` keeps of its own domain; no state that a later step reads may name it.

        Returns, raises: as `drop_sum`.
        """
        return self._drop(version, CONTRIBUTION_FOLDER, dry_run=False)

    def _drop(self, version: ModelVersion, part: str, dry_run: bool) -> int:
        size = self._artifacts.size(version, part)
        if size:
            self._store.check_inside(f"{version.location.rstrip('/')}/{part}")
        if size and not dry_run:
            # First, so that no moment is seen in which files are missing and the tag is too.
            if any(each.number == version.number for each in self.versions()):
                self._tag_version(version.number, {DROPPED[part]: "true"})
            self._artifacts.drop(version, part)
        return size

    # -- new versions

    def check_signing(self) -> None:
        """Nothing where new versions can be signed, or are not to be: better known before a step than after it.

        Raises:
            SigningError: the key cannot be used, or the library is not installed.
        """
        if self._key is not None:
            check_key(self._key)

    def check_sparsity(self, head: ModelVersion, target: float | str) -> None:
        """Check that a step with this sparsity (a share, or a pattern such as "2:4") may follow `head`.

        Raises:
            LineageConflictError: `head` was pruned to another one.
        """
        record = self.record(head)
        before = record.sparsity.target
        if record.parent is not None and before != target:  # the root is dense, it has no pattern
            raise LineageConflictError(
                f"another sparsity under the same model name: {self.model_name} is pruned to {before}, not to "
                f"{target}; set prune.sparsity back, or choose another model.name"
            )

    def register(
        self,
        folder: Path,
        record: Record,
        *,
        parent: ModelVersion | None,
        expected_head: int | None,
        seal: Callable[[str], None] | None = None,
        why: str | None = None,
    ) -> ModelVersion:
        """Publish a version whole, or not at all.

        Args:
            folder: `model/`, `state/` (not at the root) and report files; all of it becomes the version's artifacts.
                `lineage.json` is written into it, and the signature.
            record: of the version, see `flows.lineage.record`.
            parent: None for the root of a lineage. Where the lineage has a root of the same base, nothing is made and
                that root is the answer.
            expected_head: number of the head that the step began with.
            seal: called with the id of the stored artifacts at the last moment before the version is created; raises
                where the lineage was taken over. What is sealed is not withdrawn if creating the version fails: the
                next holder of the lineage adopts it.
            why: a domain was withdrawn; kept with the version until the log tells it.

        Raises:
            HeadMovedError: the head is not `expected_head` any more.
            LineageConflictError: another base or sparsity pattern under the same model name.
            RegistryError: the files are not those of the record, or the store fails.
            SigningError: the version cannot be signed.
        """
        if record.model != self.model_name:
            raise RegistryError(f"the record is of model {record.model!r}, model.name is {self.model_name!r}")
        versions = self.versions()
        if parent is None and versions:
            check_base(self.model_name, record, versions[0])
            return versions[0]
        check_head(self.model_name, versions, expected_head)
        self._check_parent(record, parent)
        tags = sealed_files(folder, record, self._key)
        self.refresh()  # what fails may have met what others wrote
        self._seen, version = publish(
            self._store,
            folder,
            record,
            tags,
            parent=parent,
            expected_head=expected_head,
            seal=seal,
            why=why,
        )
        return version

    def keep(self, version: ModelVersion, folder: Path) -> None:
        """Move the folder that a version was made of into the cache, where its artifacts are not on this machine: what
        comes next need not fetch them. Elsewhere it stays where it is.

        Args:
            folder: as it was given to `register`, on the file system of the cache.
        """
        self._artifacts.keep(version, folder)

    def _check_parent(self, record: Record, parent: ModelVersion | None) -> None:
        digest = {"version": parent.number, "digest": parent.digest} if parent else None
        named = record.parent.as_json() if record.parent else None
        if named != digest:
            raise RegistryError(f"the record's parent is {named}, the version's parent is {digest}")
        if parent is None:
            return
        check_base(self.model_name, record, parent)
        assert record.sparsity.target is not None  # only a root has none
        self.check_sparsity(parent, record.sparsity.target)

    def adopt(self, logged_model: str) -> None:
        """Publish the artifacts that a process had sealed before it died; nothing where they are published or void.

        Raises:
            RegistryError: the store fails.
        """
        adopt(self._store, logged_model)
        self.refresh()

    def sweep(self) -> None:
        """Discard what killed registrations left. Only for who holds the lineage.

        Raises:
            RegistryError: the store fails.
        """
        sweep(self._store, self._look())

    # -- what the log says and MLflow shows: see `flows.gates`

    def anchor_log(self, anchor: str) -> None:
        """Keep the number and the digest of the log's newest entry, so that the ledger alone cannot be rewritten.

        Raises:
            RegistryError: the store fails.
        """
        with self._store.client() as client:
            client.set_registered_model_tag(self.model_name, LOG_HEAD, anchor)
        seen = self._look()
        self._seen = replace(seen, tags={**seen.tags, LOG_HEAD: anchor})

    def move_alias(self, name: str, number: int | None, *, expected: int | None) -> None:
        """Move an alias as a log entry says. Only for who holds the aliases.

        Args:
            number: of the version that it is to name; None: it goes.
            expected: the version that it names now.

        Raises:
            AliasMovedError: it names another one.
            RegistryError: the store fails, or there is no such version.
        """
        actual = self.alias(name)
        if actual not in (expected, number):
            raise AliasMovedError(
                f"the alias {name} of {self.model_name} names version {actual}, not {expected}: somebody moved it "
                "at this moment; look at it, then try again"
            )
        with self._store.client() as client:
            if number is not None:
                client.set_registered_model_alias(self.model_name, name, str(number))
            elif actual is not None:
                client.delete_registered_model_alias(self.model_name, name)
        self._seen = self._look().with_alias(name, number)

    def show_gates(self, version: ModelVersion, entry: GatesEntry, files: Path, description: str | None) -> None:
        """Show the gates of a version on it and on its run; the tag `copal.gates` is set last.

        Args:
            entry: of the log, with the results. They become metrics of the run.
            files: a folder, see `flows.gates.show`; what is in it becomes artifacts of the run.
            description: of the version; None: it stays as it is.

        Raises:
            RegistryError: the store fails.
        """
        with self._store.client() as client:
            log_gates(self._store, client, version, entry.details.gates, files)
            if description is not None:
                client.update_model_version(self.model_name, str(version.number), description)
        verdict = "passed" if entry.details.passed else "failed"
        self._tag_version(version.number, {LOG_ENTRY: str(entry.number), GATES: verdict})

    def log_page(self, version: ModelVersion, html: str) -> None:
        """Keep the page of the lineage with the run that made a version, as `lineage.html`.

        Raises:
            RegistryError: the store fails.
        """
        with self._store.client() as client, TemporaryDirectory() as folder:
            run = shown_run(client, version)
            if run is not None:
                (Path(folder) / "lineage.html").write_text(html, encoding="utf-8")
                self._store.upload(run.info.artifact_uri, Path(folder))

    def _tag_version(self, number: int, tags: Mapping[str, str]) -> None:
        with self._store.client() as client:
            for name, value in tags.items():
                client.set_model_version_tag(self.model_name, str(number), name, value)
        self._seen = self._look().with_tags(number, tags)
