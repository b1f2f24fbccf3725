"""Model versions in MLflow: the only file that imports mlflow, and never at import.

A registered model name is one lineage. MLflow reserves the alias `latest`: it cannot be set, it always names the
newest version. So a version is published by creating it, and it is created last: artifacts, metrics and links are there
before, and MLflow writes the version and its tags in one transaction. What fails earlier leaves `latest` where it was.

MLflow has no compare-and-set. Names are unique, though, and that is what claims and the log are made of:
 see `Registry.add_entry`. Only who holds the lineage publishes. Should two versions still be created on the same
parent (by another copal, or by hand), numbers decide: a version whose parent is older than the version before it lost.
It is never shown, and is withdrawn.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from copal.errors import CopalError
from copal.files import flush, json_text, sha256_file, write_json
from flows.lineage.chain import entries_of, log_problems
from flows.lineage.entries import Details, Entry, GatesEntry, WithdrawalDetails, next_entry, writer
from flows.lineage.files import CONTRIBUTION_FOLDER, SIGNATURE_FILE, SUM_FOLDER, verify_files
from flows.lineage.record import RECORD_FILE, LineageError, Record, flatten, read_record, write_record
from flows.lineage.signing import check_key, sign
from flows.settings import without_secrets

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from flows.settings import Settings
    from flows.workspace import Workspace

__all__ = [
    "AliasMovedError",
    "DomainMetrics",
    "HeadMovedError",
    "LineageConflictError",
    "LogMovedError",
    "ModelVersion",
    "Registry",
    "RegistryError",
    "open_registry",
    "tags_of",
]

_log = logging.getLogger(__name__)

_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_METRICS_PER_BATCH = 1000  # MLflow's limit
_LINKED = "mlflow.modelVersions"  # MLflow's tag on a logged model: the versions made of it
_DROPPED = {SUM_FOLDER: "copal.sum_dropped", CONTRIBUTION_FOLDER: "copal.contribution_dropped"}
_WITHDRAWN, _WHY = "copal.withdrawn", "copal.why"
_LOG_RUN, _LOG_ANCHOR = "copal.log_run", "copal.log_head"  # of the name of an entry: where its file is, its digest
_ALIAS_MOVED = "copal.moved."  # and the alias: number of the log entry that it was moved by
_GATES, _LOG_ENTRY = "copal.gates", "copal.log_entry"
_NUMBERED = {  # kinds of numbered entries, and what MLflow's UI says of their names
    "claim": "Not a model: who works on the lineage of that name now, or did last (kept by copal).",
    "alias-claim": "Not a model: who moves the aliases of that name now, or did last (kept by copal).",
    "log": "Not a model: where the log of the lineage of that name ends (kept by copal).",
}
_RESERVED = re.compile(rf"\.(?:{'|'.join(_NUMBERED)})-[0-9]+$")


class RegistryError(CopalError):
    """The model registry cannot be opened, or refuses what it was asked for."""


class HeadMovedError(RegistryError):
    """Another version was registered since the step began; nothing was registered, run the step on the new head."""


class AliasMovedError(RegistryError):
    """An alias does not name the version that it should: somebody else moved it."""


class LogMovedError(RegistryError):
    """Somebody appended to the log since it was looked at."""


class LineageConflictError(RegistryError):
    """The record belongs to another base model or sparsity pattern than the lineage of this model name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelVersion:
    """A published version.

    Attributes:
        number: as MLflow counts. Numbers rise along the lineage, with gaps where a registration was withdrawn.
        aliases: `latest` at the head of the lineage, and what else was set.
        tags: `copal.domain`, `copal.dvc_md5`, `copal.git_rev`, `copal.parent_version`, `copal.key` (these five not at
            the root), `copal.settings_fingerprint`, `copal.sparsity` (as counted), `copal.base_fingerprint`,
            `copal.lineage_digest`, `copal.logged_model` (MLflow's id of the artifacts), `copal.signature` where it was
            signed (SHA-256 of the file); `copal.gates` (passed or failed) and `copal.log_entry` (its number) from
            `Registry.show_gates` on, `copal.sum_dropped` from `Registry.drop_sum` on, and `copal.contribution_dropped`
            from `Registry.drop_contribution` on. A version that withdrew a domain has `copal.withdrawn` (its name) and
            `copal.why` in place of the first three.
        run_id: of the MLflow run that made it.
        location: URI of the folder with `model/`, `state/` and `lineage.json`; see `Registry.folder`.
    """

    number: int
    aliases: tuple[str, ...]
    tags: Mapping[str, str]
    run_id: str | None
    location: str

    @property
    def parent(self) -> int | None:
        """Number of the parent version; None at the root."""
        number = self.tags.get("copal.parent_version")
        return None if number is None else int(number)

    @property
    def gates(self) -> str | None:
        """`passed` or `failed`; None where its gates never ran, or not to their end."""
        return self.tags.get(_GATES)

    @property
    def log_entry(self) -> int:
        """Number of the log entry with the gate results that it shows; 0 for none."""
        return int(self.tags.get(_LOG_ENTRY, 0))

    @property
    def concluded(self) -> bool:
        """Whether nothing is left to do for it; the dense base has no gates."""
        return self.parent is None or self.gates is not None

    @property
    def dropped(self) -> dict[str, bool]:
        """What `flows.lineage.verify_files` has to know of what was dropped."""
        return {"sum_dropped": self.sum_dropped, "contribution_dropped": self.contribution_dropped}

    @property
    def sum_dropped(self) -> bool:
        """Whether its running sum was dropped: missing files of it are no damage."""
        return _DROPPED[SUM_FOLDER] in self.tags

    @property
    def contribution_dropped(self) -> bool:
        """Whether its contribution was purged: missing files of it are no damage."""
        return _DROPPED[CONTRIBUTION_FOLDER] in self.tags

    @property
    def withdrawn(self) -> str | None:
        """The domain that it withdrew; None where it withdrew none."""
        return self.tags.get(_WITHDRAWN)


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainMetrics:
    """Perplexity of a version on one domain's evaluation windows, at the data version that the lineage names."""

    domain: str
    dvc_md5: str
    git_rev: str
    path: str
    repository: str
    perplexity: float
    dense_perplexity: float
    tokens: int


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
        if not _MODEL_NAME.fullmatch(model_name) or _RESERVED.search(model_name):
            raise RegistryError(
                f"model.name must be 1 to 128 letters, digits, '.', '_' or '-', the first a letter or digit, and not "
                f"end as copal's own names do ({', '.join(f'.{kind}-1' for kind in _NUMBERED)}), not {model_name!r}"
            )
        self.tracking_uri = tracking_uri
        self.artifact_root = artifact_root
        self.model_name = model_name
        self.cache = cache
        self.key = key
        self._client: MlflowClient | None = None

    def head(self) -> ModelVersion | None:
        """The newest version, which `models:/<name>@latest` loads; None where there is none yet."""
        versions = self.versions()
        return versions[-1] if versions else None

    def root(self) -> ModelVersion | None:
        """The dense base; number 1, unless an earlier attempt to register it was withdrawn."""
        versions = self.versions()
        return versions[0] if versions else None

    def versions(self) -> list[ModelVersion]:
        """All published versions, oldest first.

        Raises:
            RegistryError: the store cannot be opened or read.
        """
        if not self._is_there():
            return []
        with self._store() as client:
            return _published(self._all_versions(client))

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

    def find(self, key: str) -> ModelVersion | None:
        """The published version that the step `key` made, if any."""
        return next((version for version in self.versions() if version.tags.get("copal.key") == key), None)

    def folder(self, version: ModelVersion) -> Path:
        """A local folder with the version's `model/`, `state/` and `lineage.json`; treat it as read-only.

        The artifacts themselves where they are on this machine (no copy), else a copy in the cache, verified.

        Raises:
            RegistryError: the artifacts are not there, or what was fetched is not what the record names.
        """
        local = _local_path(version.location)
        if local is not None:
            if not (local / RECORD_FILE).is_file():
                raise RegistryError(
                    f"version {version.number} of {self.model_name}: {local} has no {RECORD_FILE}; "
                    "its artifacts were moved or deleted, bring them back to this path"
                )
            return local
        target = self._cached(version)
        if not target.is_dir():
            with self._fetched(version, None) as folder:
                record = self._checked(version, folder / RECORD_FILE)
                differences = verify_files(record, folder, **version.dropped)
                if differences:
                    raise RegistryError(
                        f"version {version.number} of {self.model_name}: fetched from {version.location}, "
                        f"but {differences[0]} ({len(differences)} such files); fetch it again"
                    )
                with contextlib.suppress(OSError):  # another process was faster
                    folder.rename(target)
        return target

    def record(self, version: ModelVersion) -> Record:
        """The version's lineage record, checked against the digest in the registry. Fetches no weights.

        Raises:
            LineageError: the record is damaged or was altered.
            RegistryError: it cannot be fetched.
        """
        local = _local_path(version.location)
        if local is not None:
            return self._checked(version, local / RECORD_FILE)
        path = self._cached(version).with_suffix(".json")
        if not path.is_file():
            with self._fetched(version, RECORD_FILE) as folder:
                write_record(path, self._checked(version, folder / RECORD_FILE))
        return self._checked(version, path)

    @contextlib.contextmanager
    def stored(self, version: ModelVersion, file: str | None = None) -> Iterator[Path]:
        """A folder with the version's artifacts as the store has them now, past any cache; nothing is checked.

        Args:
            file: the only one that is wanted.

        Raises:
            RegistryError: they cannot be fetched.
        """
        local = _local_path(version.location)
        if local is not None:
            yield local
            return
        with self._fetched(version, file) as folder:
            yield folder

    def check_signing(self) -> None:
        """Nothing where new versions can be signed, or are not to be: better known before a step than after it.

        Raises:
            SigningError: the key cannot be used, or the library is not installed.
        """
        if self.key is not None:
            check_key(self.key)

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

        Returns:
            The bytes it took, in the store and in a copy of it in the cache; 0 where there is none.

        Raises:
            RegistryError: the store does not let it be deleted.
        """
        return self._drop(version, CONTRIBUTION_FOLDER, dry_run=False)

    def _drop(self, version: ModelVersion, part: str, dry_run: bool) -> int:
        folders = [self._cached(version) / part]
        local = _local_path(version.location)
        if local is not None:
            folders.append(local / part)
        size = sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
        with self._store() as client:
            remote: Any = None if local is not None else self._artifacts(version.location)
            listed = remote.list_artifacts(part) if remote else []
            size += sum(file.file_size or 0 for file in listed)
            if dry_run or not size:
                return size
            # First, so that no moment is seen in which files are missing and the tag is too.
            client.set_model_version_tag(self.model_name, str(version.number), _DROPPED[part], "true")
            for folder in folders:
                if folder.exists():
                    shutil.rmtree(folder)
            if listed:
                with contextlib.suppress(NotImplementedError):
                    remote.delete_artifacts(part)
                if remote.list_artifacts(part):  # some stores say nothing
                    raise RegistryError(
                        f"the artifact store does not let copal delete {version.location}/{part}: "
                        "delete it with the store's own tools, or leave it there"
                    )
        return size

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
        metrics: Sequence[DomainMetrics],
        parent: ModelVersion | None,
        expected_head: int | None,
        seal: Callable[[str], None] | None = None,
        why: str | None = None,
    ) -> ModelVersion:
        """Publish a version whole, or not at all.

        Args:
            folder: `model/`, `state/` (not at the root) and report files; all of it becomes the version's artifacts.
                `lineage.json` is written into it, and the signature.
            record: of the version, see `flows.lineage`.
            metrics: of every domain of the record.
            parent: None for the root of a lineage. Where the lineage has a root of the same base, nothing is made and
                that root is the answer.
            expected_head: number of the head that the step began with.
            seal: called with the id of the stored artifacts at the last moment before the version is created; raises
                where the lineage was taken over. What is sealed is not withdrawn if creating the version fails: the
                next holder of the lineage adopts it.
            why: a domain was withdrawn; kept with the version until the log tells it, see `complete_log`.

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
            self._check_base(record, versions[0])
            return versions[0]
        self._check_head(versions, expected_head)
        self._check_parent(record, parent)
        differences = verify_files(record, folder)
        if differences:
            raise RegistryError(f"{folder}: not the files of its record: {differences[0]} ({len(differences)} such)")
        write_record(folder / RECORD_FILE, record)
        tags = tags_of(record)
        (folder / SIGNATURE_FILE).unlink(missing_ok=True)  # of an attempt before
        if self.key is not None:
            sign(folder, self.key)
            tags["copal.signature"] = sha256_file(folder / SIGNATURE_FILE)
        with self._store() as client:
            experiment_id = self._experiment(client)
            run_id = client.create_run(experiment_id, run_name=_run_name(record), tags=_run_tags(record)).info.run_id
            model: Any = None
            try:
                model = client.create_logged_model(
                    experiment_id,
                    name=_run_name(record).removeprefix("adapt ").replace(" ", "-"),
                    source_run_id=run_id,
                    tags=tags | ({} if why is None else {_WHY: why}),
                )
                client.log_model_artifacts(model.model_id, str(folder))
                _flush_all(_local_path(model.artifact_location))
                client.finalize_logged_model(model.model_id, "READY")
                _log_links(client, run_id, model.model_id, parent)
                _log_results(client, run_id, model.model_id, record, metrics)
                _end_run(client, run_id, "FINISHED")
                self._make_name(client)
                self._check_head(_published(self._all_versions(client)), expected_head)
                if seal:
                    seal(model.model_id)
            except BaseException:
                self._undo(client, run_id, model)
                raise
            try:
                version = self._publish(client, model)
            except BaseException as error:
                if seal is None or isinstance(error, HeadMovedError):
                    self._undo(client, run_id, model)
                raise
            with _never_fails("tidying up after a registration"):
                self._link(client, version, model)
                self._sweep(client, experiment_id, version)
            return version

    def adopt(self, logged_model: str) -> None:
        """Publish the artifacts that a process had sealed before it died; nothing where they are published or void.

        Raises:
            RegistryError: the store fails.
        """
        from mlflow.exceptions import MlflowException

        with self._store() as client:
            versions = self._all_versions(client)
            if any(version.tags["copal.logged_model"] == logged_model for version in versions):
                return
            try:
                model = client.get_logged_model(logged_model)
            except MlflowException as error:
                if error.error_code == "RESOURCE_DOES_NOT_EXIST":  # withdrawn
                    return
                raise
            shown = _published(versions)
            if int(model.tags.get("copal.parent_version", 0)) == (shown[-1].number if shown else 0):
                self._link(client, self._publish(client, model), model)

    def sweep(self) -> None:
        """Discard what killed registrations left. Only for who holds the lineage.

        Raises:
            RegistryError: the store fails.
        """
        head = self.head()
        if head is not None:
            with self._store() as client:
                self._sweep(client, self._experiment(client), head)

    # -- the log of the lineage: see `flows.lineage.entries` --

    def log(self) -> list[Entry]:
        """What happened to the versions after they were made, oldest first; checked against its anchor.

        Raises:
            LineageError: it was altered.
            RegistryError: it cannot be read.
        """
        stored, anchor = self.log_as_stored()
        problems = log_problems(stored, anchor)
        if problems:
            raise LineageError(f"the log of {self.model_name}: {problems[0]}")
        return entries_of(stored)

    def log_as_stored(self) -> tuple[list[Any], str]:
        """The log as it is stored, and its anchor, see `flows.lineage.chain.anchor_of`; nothing is checked.

        None stands for an entry whose file is not there. Files that the anchor does not lead to are left out: they are
        of an append that was killed, or was not the first to get its number.

        Raises:
            RegistryError: it cannot be read.
        """
        number, values = self._last_entry("log")
        if not number:
            return [], ""
        digest = values.get(_LOG_ANCHOR, "")
        with self._store() as client, self._log_files(client, values.get(_LOG_RUN, "")) as folder:
            return _stored_log(folder, number, digest), f"{number} {digest}"

    def append_log(
        self,
        kind: str,
        *,
        version: int | None = None,
        from_version: int | None = None,
        to_version: int | None = None,
        why: str | None = None,
        details: Details,
        after: int | None = None,
    ) -> Entry:
        """Append an entry, see `flows.lineage.entries.next_entry`.

        Anybody may, at any time: the number of an entry is one of `add_entry`, got last of all, so that none is ever
        lost or overwritten.

        Args:
            after: how many entries there were when it was decided what this one says; None: it says it whatever is in
                the log.

        Raises:
            LogMovedError: there are more than `after`; nothing was appended.
            LineageError: the log was altered.
            RegistryError: the store fails.
        """
        with self._store() as client, tempfile.TemporaryDirectory(prefix="copal-") as scratch:
            while True:
                entries = self.log()
                if after not in (None, len(entries)):
                    raise LogMovedError(f"the log of {self.model_name} has {len(entries)} entries, and not {after}")
                entry = next_entry(
                    entries,
                    kind=kind,
                    who=writer(None),
                    version=version,
                    from_version=from_version,
                    to_version=to_version,
                    why=why,
                    details=details,
                )
                digest = entry.digest
                run_id = self._last_entry("log")[1].get(_LOG_RUN) or self._log_run(client)
                file = Path(scratch) / _log_file(entry.number, digest)
                write_json(file, entry.as_json())
                client.log_artifact(run_id, str(file), "log")
                local = _local_path(client.get_run(run_id).info.artifact_uri)
                if local is not None:
                    flush(local / "log" / file.name)
                    flush(local / "log")
                got_it = self.add_entry("log", entry.number, {_LOG_ANCHOR: digest, _LOG_RUN: run_id})
                if got_it or self.log()[entry.number - 1 : entry.number] == [entry]:  # others may follow at once
                    return entry

    def _log_run(self, client: MlflowClient) -> str:
        """A new run that holds the files of the log."""
        run_id = client.create_run(
            self._experiment(client), run_name="log", tags={"mlflow.source.name": "copal"}
        ).info.run_id
        _end_run(client, run_id, "FINISHED")
        return str(run_id)

    def complete_log(self) -> None:
        """Append the entry of the head's withdrawal where it is missing. Only for who holds the lineage.

        That is how the entry comes into the log, be it by who withdrew, or by the next one where that was killed.

        Raises:
            LineageError: the log was altered.
            RegistryError: the store fails.
        """
        head = self.head()
        gone = self.record(head).withdraws if head is not None and head.withdrawn is not None else None
        if head is None or gone is None:
            return
        if not any(entry.kind == "withdrawal" and entry.version == head.number for entry in self.log()):
            details = WithdrawalDetails(domain=gone.name, dvc_md5=gone.dvc_md5)
            self.append_log("withdrawal", version=head.number, why=head.tags.get(_WHY), details=details)

    def _model_tags(self, client: MlflowClient) -> dict[str, str]:
        model = self._model(client)
        return dict(model.tags) if model else {}

    def _model(self, client: MlflowClient) -> Any:
        """MLflow's registered model; None where there is none yet."""
        from mlflow.exceptions import MlflowException

        try:
            return client.get_registered_model(self.model_name)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise

    @contextlib.contextmanager
    def _log_files(self, client: MlflowClient, run_id: str) -> Iterator[Path]:
        """A folder with the files of the log: where they are, or a copy."""
        uri = f"{client.get_run(run_id).info.artifact_uri}/log"
        local = _local_path(uri)
        if local is not None:
            yield local
            return
        from mlflow.artifacts import download_artifacts

        with (
            tempfile.TemporaryDirectory(prefix="copal-") as scratch,
            contextlib.redirect_stderr(io.StringIO()),  # of a progress bar
        ):
            yield Path(download_artifacts(uri, dst_path=scratch, tracking_uri=self.tracking_uri))

    def lineages(self) -> list[Registry]:
        """Every lineage of the store, by name, this one included where it has versions.

        Claims and what others registered have no versions of copal's, and so are no lineages.

        Raises:
            RegistryError: the store cannot be read.
        """
        if not self._is_there():
            return []
        with self._store() as client:
            names = [entry.name for entry in _pages(lambda token: client.search_registered_models(page_token=token))]
        named = (name for name in sorted(names) if _MODEL_NAME.fullmatch(name) and not _RESERVED.search(name))
        others = [Registry(self.tracking_uri, self.artifact_root, name, self.cache, self.key) for name in named]
        return [other for other in others if other.head() is not None]

    # -- what the log says and MLflow shows: see `flows.gates.champion` --

    def alias(self, name: str) -> int | None:
        """The number of the version that an alias names; None where it names none.

        Raises:
            RegistryError: the store cannot be read.
        """
        if not self._is_there():
            return None
        with self._store() as client:
            return self._alias(client, name)

    def moved_by(self, name: str) -> int:
        """The number of the log entry that `move_alias` moved an alias by the last time; 0 for none.

        Raises:
            RegistryError: the store cannot be read.
        """
        if not self._is_there():
            return 0
        with self._store() as client:
            return int(self._model_tags(client).get(f"{_ALIAS_MOVED}{name}", 0))

    def move_alias(self, name: str, number: int | None, *, expected: int | None, entry: int) -> None:
        """Move an alias as a log entry says. Only for who holds the aliases.

        Args:
            number: of the version that it is to name; None: it goes.
            expected: the version that it names now, looked at again just before.
            entry: number of the log entry.

        Raises:
            AliasMovedError: it names another one.
            RegistryError: the store fails, or there is no such version.
        """
        with self._store() as client:
            actual = self._alias(client, name)
            if actual not in (expected, number):
                raise AliasMovedError(
                    f"the alias {name} of {self.model_name} names version {actual}, not {expected}: somebody moved it "
                    "at this moment; look at it, then try again"
                )
            if number is not None:
                client.set_registered_model_alias(self.model_name, name, str(number))
            elif actual is not None:
                client.delete_registered_model_alias(self.model_name, name)
            client.set_registered_model_tag(self.model_name, f"{_ALIAS_MOVED}{name}", str(entry))

    def show_gates(self, version: ModelVersion, entry: GatesEntry) -> None:
        """Show the gates of a version on it and on its run; the tag `copal.gates` is set last.

        Args:
            entry: of the log, with the results. They become metrics of the run and its table `gates.json`.

        Raises:
            RegistryError: the store fails.
        """
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        gates = [gate.as_json() for gate in entry.details.gates]
        figures = {f"gate.{gate['name']}.passed": float(gate["passed"]) for gate in gates}
        figures |= {f"gate.{gate['name']}": gate["value"] for gate in gates if gate["value"] is not None}
        columns = ["name", "passed", "value", "limit", "detail"]
        table = {"columns": columns, "data": [[gate[column] for column in columns] for gate in gates]}
        with self._store() as client:
            if version.run_id is not None:
                metrics = [Metric(name, value, now, 0) for name, value in figures.items()]
                client.log_batch(version.run_id, metrics=metrics, synchronous=True)
                # As MLflow's log_table has it, which would add to the rows of an earlier judgement.
                client.log_text(version.run_id, json.dumps(table), "gates.json")
                shown = json.dumps([{"path": "gates.json", "type": "table"}])
                client.set_tag(version.run_id, "mlflow.loggedArtifacts", shown)
            number = str(version.number)
            verdict = "passed" if entry.details.passed else "failed"
            client.set_model_version_tag(self.model_name, number, _LOG_ENTRY, str(entry.number))
            client.set_model_version_tag(self.model_name, number, _GATES, verdict)

    def log_page(self, version: ModelVersion, html: str) -> None:
        """Keep the page of the lineage with the run that made a version, as `lineage.html`.

        Raises:
            RegistryError: the store fails.
        """
        if version.run_id is not None:
            with self._store() as client:
                client.log_text(version.run_id, html, "lineage.html")

    def _alias(self, client: MlflowClient, name: str) -> int | None:
        model = self._model(client)
        found = model.aliases.get(name) if model else None
        return None if found is None else int(found)

    # -- numbered entries: what claims and the log are made of --

    def entries(self, kind: str) -> dict[int, dict[str, str]]:
        """The entries of a kind ("claim", "alias-claim" or "log") that are there, by number, with their values.

        Of one that others delete at this moment, for it was passed, the values may be missing.

        Raises:
            RegistryError: the store cannot be read.
        """
        if not self._is_there():
            return {}
        prefix = self._entry_name(kind, "")
        with self._store() as client:
            query = f"name LIKE '{prefix}%'"  # an underscore matches anything, hence the look at the name
            found = _pages(lambda token: client.search_registered_models(query, page_token=token))
            return {
                int(entry.name.removeprefix(prefix)): dict(entry.tags)
                for entry in found
                if entry.name.startswith(prefix) and entry.name.removeprefix(prefix).isdecimal()
            }

    def add_entry(self, kind: str, number: int, values: Mapping[str, str]) -> bool:
        """Append an entry and delete those before it; False where another has that number, or had.

        A number is a unique name in MLflow's database, so of all who want it one gets it. The last entry is never
        deleted and the highest number only rises: an entry that is not the highest was appended at a place that others
        had passed. Values tell whose an entry is where the store's answer was lost.

        Raises:
            RegistryError: the store fails.
        """
        from mlflow.exceptions import MlflowException

        with self._store() as client:
            try:
                client.create_registered_model(self._entry_name(kind, number), dict(values), _NUMBERED[kind])
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            found = self.entries(kind)
            if max(found, default=0) != number or found[number] != values:
                return False
            for old in found:
                if old < number:
                    self._drop_entry(client, kind, old)
            return True

    def change_entry(self, kind: str, number: int, values: Mapping[str, str]) -> None:
        """Change values of an entry.

        Raises:
            RegistryError: there is none, or the store fails.
        """
        with self._store() as client:
            for name, value in values.items():
                client.set_registered_model_tag(self._entry_name(kind, number), name, value)

    def _last_entry(self, kind: str) -> tuple[int, dict[str, str]]:
        """Number and values of the last entry; 0 and none where there is none."""
        before = 0
        while True:
            found = self.entries(kind)
            number = max(found, default=0)
            if number == before or found[number]:  # without values it was passed, unless it is still the last
                return number, found.get(number, {})
            before = number

    def _drop_entry(self, client: MlflowClient, kind: str, number: int) -> None:
        from mlflow.exceptions import MlflowException

        try:
            client.delete_registered_model(self._entry_name(kind, number))
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # another was faster
                raise

    def _entry_name(self, kind: str, number: int | str) -> str:
        return f"{self.model_name}.{kind}-{number if isinstance(number, str) else f'{number:08d}'}"

    # -- the steps of register --

    def _check_base(self, record: Record, version: ModelVersion) -> None:
        ours, theirs = record.base.fingerprint, version.tags["copal.base_fingerprint"]
        if ours != theirs:
            raise LineageConflictError(
                f"another base under the same model name: {self.model_name} was started from base {theirs}, "
                f"this one is {ours}; choose another model.name"
            )

    def _check_head(self, versions: Sequence[ModelVersion], expected: int | None) -> None:
        number = versions[-1].number if versions else None
        if number != expected:
            raise HeadMovedError(
                f"the head of {self.model_name} is version {number}, the step began with {expected}; "
                "nothing was registered, run the step again"
            )

    def _check_parent(self, record: Record, parent: ModelVersion | None) -> None:
        digest = {"version": parent.number, "digest": parent.tags["copal.lineage_digest"]} if parent else None
        named = record.parent.as_json() if record.parent else None
        if named != digest:
            raise RegistryError(f"the record's parent is {named}, the version's parent is {digest}")
        if parent is None:
            return
        self._check_base(record, parent)
        assert record.sparsity.target is not None  # only a root has none
        self.check_sparsity(parent, record.sparsity.target)

    def _make_name(self, client: MlflowClient) -> None:
        from mlflow.exceptions import MlflowException

        try:
            client.create_registered_model(self.model_name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _publish(self, client: MlflowClient, model: Any) -> ModelVersion:
        """Create the version of a logged model, which carries the version's tags."""
        tags = {name: value for name, value in model.tags.items() if name.startswith("copal.")}
        # The location, not models:/<id>: MLflow would look the id up in the process-wide store, not in this client's.
        made = client.create_model_version(
            self.model_name,
            source=model.artifact_location,
            run_id=model.source_run_id,
            tags=tags | {"copal.logged_model": model.model_id},
            model_id=model.model_id,
        )
        every = self._all_versions(client)
        twin = next(version for version in every if version.tags["copal.logged_model"] == model.model_id)
        if twin.number != int(made.version):
            client.delete_model_version(self.model_name, made.version)
            raise RegistryError(
                f"version {twin.number} of {self.model_name} is this one: the process that took over published it"
            )
        versions = _published(every)
        for version in versions:
            if version.number == int(made.version):
                return version
        raise HeadMovedError(
            f"version {versions[-1].number} of {self.model_name} was registered at the same moment; "
            "this one was withdrawn, run the step again"
        )

    def _undo(self, client: MlflowClient, run_id: str, model: Any) -> None:
        """Withdraw a registration that failed; what cannot be withdrawn now, a later registration discards."""
        with _never_fails(f"withdrawing run {run_id}"):
            if model is not None:
                # The version first: should that fail, its artifacts stay, for it may be seen. It may be there even if
                # creating it failed, for instance where only a server's answer was lost.
                for version in self._all_versions(client):
                    if version.tags.get("copal.logged_model") == model.model_id:
                        client.delete_model_version(self.model_name, str(version.number))
                self._discard(client, model)
            _end_run(client, run_id, "FAILED")

    def _link(self, client: MlflowClient, version: ModelVersion, model: Any) -> None:
        """Link artifacts to their version for MLflow's UI."""
        if _LINKED not in client.get_logged_model(model.model_id).tags:  # a server has done it
            link = json.dumps([{"name": self.model_name, "version": version.number}])
            client.set_logged_model_tags(model.model_id, {_LINKED: link})

    def _sweep(self, client: MlflowClient, experiment_id: str, head: ModelVersion) -> None:
        """Discard what killed registrations left: runs, artifacts, versions that lost.

        A leftover is never in the way: it is no version, or one that lost (see `_published`). One with an older parent
        than the head can never be published any more.
        """
        every = self._all_versions(client)
        shown = {version.number: version.tags["copal.logged_model"] for version in _published(every)}
        for version in every:
            if version.number not in shown and version.number < head.number:
                client.delete_model_version(self.model_name, str(version.number))
        for leftover in _pages(lambda token: client.search_logged_models([experiment_id], page_token=token)):
            tags = leftover.tags
            # The link alone would not do: a process may have been killed between publishing and linking.
            published = leftover.model_id in shown.values() or _LINKED in tags
            ours = "copal.lineage_digest" in tags
            if ours and not published and int(tags.get("copal.parent_version", 0)) < head.number:
                self._discard(client, leftover)
                _end_run(client, leftover.source_run_id, "FAILED")
        running = "attributes.status = 'RUNNING' and tags.`mlflow.source.name` = 'copal'"
        for run in _pages(lambda token: client.search_runs([experiment_id], running, page_token=token)):
            _end_run(client, run.info.run_id, "KILLED")

    def _discard(self, client: MlflowClient, model: Any) -> None:
        local = _local_path(model.artifact_location)
        if local is None:
            self._artifacts(model.artifact_location).delete_artifacts()
        elif local.parent.is_dir():
            shutil.rmtree(local.parent)  # MLflow's folder of this logged model: models/<id>/artifacts
        client.delete_logged_model(model.model_id)

    # -- the store --

    @contextlib.contextmanager
    def _store(self) -> Iterator[MlflowClient]:
        """MLflow's client; its log is kept off the terminal and its errors become one line."""
        path = self._sqlite_path()
        if path is not None and path.exists():
            _check_sqlite(path)  # MLflow tries a broken file for 100 s, with a traceback each time
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        with _quiet():
            try:
                if self._client is None:
                    self._client = MlflowClient(tracking_uri=self.tracking_uri, registry_uri=self.tracking_uri)
                yield self._client
            except (MlflowException, SQLAlchemyError, OSError) as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                message = f"MLflow store {self.tracking_uri}: {reason}"
                raise RegistryError(without_secrets(message)) from error

    def _is_there(self) -> bool:
        """Whether there is a store to read: to look into one that is not there would make it."""
        path = self._sqlite_path()
        return path is None or path.exists()

    def _sqlite_path(self) -> Path | None:
        scheme, _, path = self.tracking_uri.partition(":///")
        return Path(path.partition("?")[0]) if scheme.partition("+")[0] == "sqlite" else None

    def _experiment(self, client: MlflowClient) -> str:
        from mlflow.exceptions import MlflowException

        if ":/" in str(self.artifact_root):  # a URI
            location = f"{str(self.artifact_root).rstrip('/')}/{self.model_name}"
        else:
            location = (Path(self.artifact_root).resolve() / self.model_name).as_uri()
        try:
            return str(client.create_experiment(self.model_name, artifact_location=location))
        except MlflowException as error:
            experiment = client.get_experiment_by_name(self.model_name)
            if experiment is None:
                raise
            if experiment.lifecycle_stage != "active":
                raise RegistryError(f"MLflow's experiment {self.model_name} was deleted; restore it") from error
            return str(experiment.experiment_id)

    def _all_versions(self, client: MlflowClient) -> list[ModelVersion]:
        """Every version of this model that copal made, oldest first, those that lost a race included."""
        model = self._model(client)
        if model is None:
            return []
        aliases: dict[int, list[str]] = {}
        for alias, number in model.aliases.items():
            aliases.setdefault(int(number), []).append(alias)
        query = f"name = '{self.model_name}'"
        found = [
            ModelVersion(
                number=int(version.version),
                aliases=tuple(sorted(aliases.get(int(version.version), []))),
                tags=dict(version.tags),
                run_id=version.run_id or None,
                location=version.source,
            )
            for version in _pages(lambda token: client.search_model_versions(query, page_token=token))
            if "copal.lineage_digest" in version.tags  # anybody may register other things under this name
        ]
        return sorted(found, key=lambda version: version.number)

    # -- artifacts --

    def _artifacts(self, location: str) -> Any:
        """MLflow's access to the artifacts at a URI."""
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        return get_artifact_repository(location, tracking_uri=self.tracking_uri)

    def _cached(self, version: ModelVersion) -> Path:
        digest = version.tags["copal.lineage_digest"]  # two stores may share a cache, and both have a version 1
        return self.cache / self.model_name / f"{version.number}-{digest[:16]}"

    @contextlib.contextmanager
    def _fetched(self, version: ModelVersion, file: str | None) -> Iterator[Path]:
        """A temporary folder in the cache with the version's artifacts, or with one file of them."""
        parent = self._cached(version).parent
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".fetch-", dir=parent))
        try:
            # MLflow draws a progress bar; for one small file it is noise.
            hidden = contextlib.nullcontext() if file is None else contextlib.redirect_stderr(io.StringIO())
            with self._store(), hidden:
                from mlflow.artifacts import download_artifacts

                uri = version.location if file is None else f"{version.location.rstrip('/')}/{file}"
                got = Path(download_artifacts(uri, dst_path=str(folder), tracking_uri=self.tracking_uri))
            yield got if file is None else got.parent
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _checked(self, version: ModelVersion, path: Path) -> Record:
        record = read_record(path)
        if record.digest != version.tags["copal.lineage_digest"]:
            raise LineageError(
                f"{path}: is not the record that version {version.number} of {self.model_name} was registered with "
                "(its digest differs): it was altered, bring the original back"
            )
        return record


def _published(versions: Sequence[ModelVersion]) -> list[ModelVersion]:
    """Of versions in rising order, those of the lineage: a version made of a parent older than its predecessor lost."""
    shown: list[ModelVersion] = []
    for version in versions:
        if not shown or (version.parent or 0) >= shown[-1].number:
            shown.append(version)
    if shown:
        shown[-1] = replace(shown[-1], aliases=(*shown[-1].aliases, "latest"))
    return shown


def _run_name(record: Record) -> str:
    gone = record.withdraws
    if gone is not None:
        return f"withdraw {gone.name}"
    return "base" if record.step is None else f"adapt {record.step.name}"


def _run_tags(record: Record) -> dict[str, str]:
    commit = record.code.git_commit
    return {"mlflow.source.name": "copal", **({"mlflow.source.git.commit": commit} if commit else {})}


def tags_of(record: Record) -> dict[str, str]:
    """The tags of a version that say what its record says."""
    step, gone = record.step, record.withdraws
    tags = {
        "copal.domain": step and step.name,
        "copal.dvc_md5": step and step.dvc_md5,
        "copal.git_rev": step and step.git_rev,
        _WITHDRAWN: gone and gone.name,
        "copal.parent_version": record.parent and record.parent.version,
        "copal.key": record.key,
        "copal.settings_fingerprint": record.settings_fingerprint,
        "copal.sparsity": record.sparsity.counted,
        "copal.base_fingerprint": record.base.fingerprint,
        "copal.lineage_digest": record.digest,
    }
    return {name: str(value) for name, value in tags.items() if value is not None}


def _log_links(client: MlflowClient, run_id: str, model_id: str, parent: ModelVersion | None) -> None:
    from mlflow.entities import LoggedModelInput, LoggedModelOutput

    if parent is not None:
        client.log_inputs(run_id, models=[LoggedModelInput(parent.tags["copal.logged_model"])])
    client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])


def _log_results(
    client: MlflowClient, run_id: str, model_id: str, record: Record, metrics: Sequence[DomainMetrics]
) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param

    now = int(time.time() * 1000)
    datasets, logged = [], []
    for place, domain in enumerate(metrics):
        source = {
            "repository": domain.repository,
            "rev": domain.git_rev,
            "path": domain.path,
            "md5": domain.dvc_md5,
        }
        dataset = Dataset(domain.domain, domain.dvc_md5, source_type="dvc", source=json.dumps(source))
        datasets.append(DatasetInput(dataset, [InputTag("mlflow.data.context", "evaluation")]))
        values = {
            "perplexity": domain.perplexity,
            "dense_perplexity": domain.dense_perplexity,
            "evaluation_tokens": domain.tokens,
        }
        logged += [
            # A millisecond apart: MLflow keeps one value per model, name, time and step, whatever the dataset.
            Metric(
                name,
                value,
                now + place,
                0,
                model_id=model_id,
                dataset_name=domain.domain,
                dataset_digest=domain.dvc_md5,
                run_id=run_id,
            )
            for name, value in values.items()
        ]
        logged.append(Metric(f"perplexity.{domain.domain}", domain.perplexity, now, 0, run_id=run_id))
    flat = {
        "sparsity": record.sparsity.counted,
        "weights_back": record.weights_back,
        "perplexity_before": record.perplexity_before,
        "backward_transfer": record.backward_transfer,
        "seconds": record.seconds.total,
        **{f"seconds.{name}": value for name, value in record.seconds.as_json().items()},
    }
    logged += [
        Metric(name, value, now, 0, model_id=model_id, run_id=run_id)
        for name, value in flat.items()
        if value is not None
    ]
    if datasets:
        client.log_inputs(run_id, datasets=datasets)
    client.log_batch(run_id, params=[Param(name, _param(value)) for name, value in flatten(record.settings)])
    for start in range(0, len(logged), _METRICS_PER_BATCH):
        client.log_batch(run_id, metrics=logged[start : start + _METRICS_PER_BATCH], synchronous=True)


def _param(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _end_run(client: MlflowClient, run_id: str, status: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()):  # of a server, MLflow prints the run's address
        client.set_terminated(run_id, status)


def _pages(search: Callable[[str | None], Any]) -> Iterator[Any]:
    token: str | None = None
    while True:
        page = search(token)
        yield from page
        token = page.token
        if not token:
            return


def _local_path(uri: str) -> Path | None:
    """The folder that `uri` names on this machine; None if it is remote."""
    parts = urlsplit(uri)
    if parts.scheme == "file" and not parts.netloc:
        return Path(unquote(parts.path))
    return None if parts.scheme else Path(uri)


def _log_file(number: int, digest: str) -> str:
    return f"{number:06d}-{digest[:16]}.json"


def _stored_log(folder: Path, count: int, digest: str) -> list[Any]:
    """The first `count` entries of a log, the last with this digest, each found by what the one after it names."""
    entries: list[Any] = []
    for number in range(count, 0, -1):
        file = folder / _log_file(number, digest)
        if not file.is_file():  # the one after it was altered, or this one is gone
            file = next(iter(sorted(folder.glob(f"{number:06d}-*.json"))), file)
        entry = _read_json(file) if file.is_file() else None
        entries.append(entry)
        digest = str(entry.get("previous")) if isinstance(entry, dict) else ""
    return entries[::-1]


def _read_json(path: Path) -> Any:
    """What a file holds; what is not JSON as `write_json` spells it comes as text, for whoever checks it."""
    content = path.read_bytes()
    try:
        value = json.loads(content)
        if json_text(value).encode() == content:
            return value
    except ValueError:
        pass
    return content.decode(errors="replace")


def _flush_all(folder: Path | None) -> None:
    """Bring a folder's files to the disk before a version names them; a power cut must not leave one half there."""
    if folder is None:
        return
    for path in (folder, *folder.rglob("*")):
        flush(path)


def _check_sqlite(path: Path) -> None:
    try:
        with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", uri=True)) as connection:
            connection.execute("PRAGMA schema_version").fetchone()
    except sqlite3.Error as error:
        raise RegistryError(f"MLflow store {path}: {error}; bring back a copy, or name another store") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """MLflow logs each step of its migrations, and a traceback for errors that are raised as well."""
    loggers = [logging.getLogger(name) for name in ("mlflow", "alembic")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _never_fails(doing: str) -> Iterator[None]:
    """Cleaning up must not hide the error that made it needed, nor undo what was published."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        _log.warning("%s: %s", doing, str(error).splitlines()[0])
