"""The versions of one registered model in MLflow. A registered model name is one lineage.

What is read is read once and kept, for one operation of one process: a `Registry` is opened for each. Its own writes
are seen at once; what others write is seen after `refresh`, which whoever takes the lineage or its aliases calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from flows.lineage.entries import GatesEntry
from flows.lineage.files import CONTRIBUTION_FOLDER, SUM_FOLDER
from flows.lineage.record import Record
from flows.lineage.signing import check_key
from flows.registry.artifacts import Artifacts
from flows.registry.errors import AliasMovedError, LineageConflictError, RegistryError
from flows.registry.publish import adopt, check_base, check_head, publish, sealed_files, sweep
from flows.registry.runs import log_gates, shown_run
from flows.registry.store import Store
from flows.registry.versions import DROPPED, GATES, LOG_ENTRY, ModelVersion, Snapshot, linked, look, look_at_aliases

if TYPE_CHECKING:
    from flows.settings import Settings
    from flows.workspace import Workspace

__all__ = ["Registry", "open_registry"]

_BASE, _LOGGED = "copal.base_fingerprint", "copal.logged_model"
_LOG_HEAD = "copal.log_head"  # the tag that anchors the ledger's log


def open_registry(workspace: Workspace, settings: Settings) -> Registry:
    """The registry that the settings name; nothing is opened before the first call."""
    return Registry(
        workspace.registry_uri(settings),
        workspace.artifacts,
        settings.model.name,
        workspace.cache / "registry",
        workspace.path(settings.signing.key),
    )


class Registry:
    """The versions of one registered model.

    Reading never creates a store: where the SQLite file of `tracking_uri` is not there, there are no versions.
    """

    def __init__(
        self, tracking_uri: str, artifact_root: Path | str, model_name: str, cache: Path, key: Path | None = None
    ) -> None:
        """Nothing is opened yet.

        Args:
            tracking_uri: MLflow's store, `sqlite:////absolute/path.db` or a server.
            artifact_root: folder or URI under which the artifacts of new versions go.
            model_name: registered model; the experiment has the same name.
            cache: folder for what is fetched from a remote artifact store.
            key: the private key that new versions are signed with; None: they are not.

        Raises:
            RegistryError: `model_name` cannot name a model.
        """
        self._store = Store(tracking_uri, artifact_root, model_name)
        self._cache = cache
        self._key = key
        self._artifacts = Artifacts(self._store, cache)
        self._seen: Snapshot | None = None

    @property
    def tracking_uri(self) -> str:
        """MLflow's store."""
        return self._store.tracking_uri

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
            with self._store.client() as client:
                self._seen = look(self._store, client)
        return self._seen

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

    def lineages(self) -> list[Registry]:
        """Every lineage of the store, by name, this one included where it has versions.

        What others registered has no versions of copal's, and so is no lineage.

        Raises:
            RegistryError: the store cannot be read.
        """
        if not self._store.is_there:
            return []
        root, uri = self._store.artifact_root, self.tracking_uri
        others = [Registry(uri, root, name, self._cache, self._key) for name in self._store.model_names()]
        return [other for other in others if other.head() is not None]

    # -- the files of a version

    def folder(self, version: ModelVersion) -> Path:
        """A local folder with the version's `model/`, `state/` and `lineage.json`; treat it as read-only.

        The artifacts themselves where they are on this machine (no copy), else a copy in the cache, verified.

        Raises:
            RegistryError: the artifacts are not there, or what was fetched is not what the record names.
        """
        return self._artifacts.folder(version)

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

    def log_anchor(self) -> str:
        """What the registry keeps of the log: number and digest of its newest entry; "" where it keeps nothing."""
        return self._look().tags.get(_LOG_HEAD, "")

    def anchor_log(self, anchor: str) -> None:
        """Keep the number and the digest of the log's newest entry, so that the ledger alone cannot be rewritten.

        Raises:
            RegistryError: the store fails.
        """
        with self._store.client() as client:
            client.set_registered_model_tag(self.model_name, _LOG_HEAD, anchor)
        seen = self._look()
        self._seen = replace(seen, tags={**seen.tags, _LOG_HEAD: anchor})

    def alias(self, name: str) -> int | None:
        """The number of the version that an alias names; None where it names none.

        Raises:
            RegistryError: the store cannot be read.
        """
        return self._look().aliases.get(name)

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

    def run_is_deleted(self, version: ModelVersion) -> bool:
        """Whether somebody deleted the MLflow run that made a version, where it has figures and pictures.

        Raises:
            RegistryError: the store cannot be read.
        """
        with self._store.client() as client:
            return version.run_id is not None and shown_run(client, version) is None

    def _tag_version(self, number: int, tags: Mapping[str, str]) -> None:
        with self._store.client() as client:
            for name, value in tags.items():
                client.set_model_version_tag(self.model_name, str(number), name, value)
        self._seen = self._look().with_tags(number, tags)
