"""Whether a version is what it was when it was registered: everything that differs, a line each.

Files are compared with the record's SHA-256, the record with the registry's tags, records with one another up to the
root, the log with its anchor and with what the registry shows, data with the md5 in the record, and the signature with
the public key.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from copal.errors import CopalError
from copal.files import json_text, sha256_file
from flows.gates.champion import named, unsettled
from flows.ledger import LedgerError
from flows.lineage.chain import entries_of, log_problems, not_anchored
from flows.lineage.entries import CHALLENGER, CHAMPION, Entry, logged_alias
from flows.lineage.files import SIGNATURE_FILE, verify_files
from flows.lineage.record import RECORD_FILE, LineageError, Record, read_record
from flows.lineage.signing import signature_problem
from flows.project import Project
from flows.registry.errors import RegistryError
from flows.registry.registry import Registry
from flows.registry.versions import ModelVersion, tags_of
from flows.workspace import exclusive

__all__ = ["Verification", "folder_problems", "record_problems", "verify"]

# Of the tags that say what the record says, those that not every version has.
_TAGS = frozenset({"copal.domain", "copal.dvc_md5", "copal.git_rev", "copal.parent_version", "copal.key"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """What was looked at, and what differs.

    Attributes:
        findings: what differs; none where the version is what it was.
        checked: what was looked at, differing or not.
        skipped: what was not, and why.
    """

    version: int
    findings: tuple[str, ...]
    checked: tuple[str, ...]
    skipped: tuple[str, ...]


def verify(project: Project, version: ModelVersion, *, data: bool = True) -> Verification:
    """Check all of a version against what was recorded of it. Changes nothing.

    Artifacts are read where they are stored; of a remote store they are fetched anew, past the cache.

    Args:
        data: fetch the data of every domain too, from DVC's remote, where one is set, and hash it.

    Raises:
        RegistryError: the registry cannot be read.
        SigningError: the version is signed, and its signature cannot be checked with the keys that are set.
    """
    workspace, settings, registry = project.workspace, project.settings, project.registry
    findings: list[str] = []
    checked, skipped = [], []
    record: Record | None = None
    try:
        with registry.stored(version) as folder:
            record, found = folder_problems(version, folder)
            findings += found
            checked.append(f"{len(record.files) if record else 0} files and {RECORD_FILE}")
            signed = (folder / SIGNATURE_FILE).is_file()
            key, public_key = workspace.path(settings.signing.key), workspace.path(settings.signing.public_key)
            if not signed and record is not None and record.settings.get("signing", {}).get("key"):
                findings.append("signature: there is none, and by its record the version was signed")
            elif not signed:
                skipped.append("signature: there is none")
            elif key is None and public_key is None:
                skipped.append("signature: signing.public_key is not set")
            else:
                problem = signature_problem(folder, key=key, public_key=public_key)
                findings += [f"signature: {problem}"] if problem else []
                checked.append("signature")
    except RegistryError as error:
        findings.append(str(error))

    ancestors, found = _ancestry_problems(registry, version, record)
    findings += found
    checked.append(f"{ancestors} ancestors")
    try:
        entries, anchor = project.ledger.log_as_stored(), registry.log_anchor()
        found = log_problems(entries, anchor)
        findings += found or _shown_otherwise(project, entries_of(entries))
        checked.append(f"{len(entries)} log entries")
        late = not_anchored(entries, anchor)
        if late and not found:
            skipped.append(f"the newest {late} log entries: they are not anchored in the registry yet")
    except (LedgerError, RegistryError) as error:
        findings.append(f"log: {error}")
    if registry.run_is_deleted(version):
        findings.append(
            f"the MLflow run {version.run_id} of version {version.number} was deleted: bring it back with "
            f"`mlflow runs restore --run-id {version.run_id}`; after `mlflow gc` its figures are in the record only"
        )
    if not data:
        skipped.append("data")
    elif record is not None:
        findings += _data_problems(project, version, record)
        checked.append(f"data of {len(record.domains)} domains")
    return Verification(
        version=version.number, findings=tuple(findings), checked=tuple(checked), skipped=tuple(skipped)
    )


def folder_problems(version: ModelVersion, folder: Path) -> tuple[Record | None, list[str]]:
    """The record in a version's folder (None where it cannot be read), and how the folder differs from the registry
    and the record. Leaves out what takes a key, other versions, or data.
    """
    record, findings = record_problems(version, folder / RECORD_FILE)
    if record is None:
        findings.append("the files cannot be checked without the record")
    else:
        findings += verify_files(record, folder, **version.dropped)
    registered = version.tags.get("copal.signature")
    signature = folder / SIGNATURE_FILE
    if signature.is_file():
        if registered is None:
            findings.append(f"extra: {SIGNATURE_FILE}")
        elif sha256_file(signature) != registered:
            findings.append(f"changed: {SIGNATURE_FILE}")
    elif registered is not None:
        findings.append(f"missing: {SIGNATURE_FILE}")
    return record, findings


def record_problems(version: ModelVersion, path: Path) -> tuple[Record | None, list[str]]:
    """The record of a version in the file `path`, None where it cannot be read, and what is wrong with it."""
    try:
        record = read_record(path)
    except LineageError as error:
        return None, [str(error)]
    # Two spellings may be one value (1e-5 and 1E-5) and so have one digest: what was written has one spelling only.
    differs = (
        [] if path.read_bytes() == json_text(record.as_json()).encode() else [f"changed: {RECORD_FILE}: its spelling"]
    )
    ours, theirs = tags_of(record), version.tags
    differs += [
        f"{RECORD_FILE} and the registry differ: {tag} is {ours.get(tag)!r} here and {theirs.get(tag)!r} there"
        for tag in sorted(ours.keys() | (theirs.keys() & _TAGS))
        if ours.get(tag) != theirs.get(tag)
    ]
    return record, differs


def _ancestry_problems(registry: Registry, version: ModelVersion, record: Record | None) -> tuple[int, list[str]]:
    """How many ancestors there are, and where the chain of records up to the root is broken."""
    there = {other.number: other for other in registry.versions()}
    findings = []
    count = 0
    while version.parent is not None or (record is not None and record.parent is not None):
        named_parent = record.parent if record is not None else None
        number = version.parent if version.parent is not None else named_parent.version if named_parent else 0
        parent = there.get(number)
        if parent is None or number >= version.number:
            findings.append(f"version {version.number}: its parent {number} is no version of {registry.model_name}")
            break
        registered = {"version": number, "digest": parent.tags["copal.lineage_digest"]}
        recorded = named_parent.as_json() if named_parent else None
        if record is not None and recorded != registered:
            findings.append(f"version {version.number}: its record's parent is {recorded}, not {registered}")
        base = record.base if record is not None else None
        try:
            with registry.stored(parent, RECORD_FILE) as folder:
                record, found = record_problems(parent, folder / RECORD_FILE)
        except RegistryError as error:
            record, found = None, [str(error)]
        findings += [f"version {number}: {problem}" for problem in found]
        if base is not None and record is not None and record.base != base:
            findings.append(f"version {number}: its base is not that of version {version.number}")
        version = parent
        count += 1
    return count, findings


def _shown_otherwise(project: Project, entries: Sequence[Entry]) -> Iterator[str]:
    """Where the registry shows what a whole log does not tell: entries were cut off, or somebody moved an alias."""
    registry = project.registry
    versions = registry.versions()
    purged = {number for entry in entries if entry.kind == "purge" for number in entry.details.deleted}
    for version in versions:
        number = version.log_entry
        if version.gates is not None:
            entry = entries[number - 1] if 0 < number <= len(entries) else None
            told = (entry.details.record, entry.details.passed) if entry and entry.kind == "gates" else None
            if told != (version.digest, version.gates == "passed"):
                yield f"log: its entry {number} is not that of the gates of version {version.number} ({version.gates})"
        withdrawn = any(entry.kind == "withdrawal" and entry.version == version.number for entry in entries)
        if version.withdrawn and not withdrawn and version != versions[-1]:  # the head's may come yet
            yield f"log: no entry tells that version {version.number} withdrew {version.withdrawn}"
        if version.contribution_dropped and version.number not in purged:
            yield f"log: no entry tells that the contribution of version {version.number} was purged"
    unfinished = {
        alias
        for alias, entry, actual in unsettled(project, entries)
        if actual in (entry.from_version, entry.to_version)
    }
    for alias in (CHALLENGER, CHAMPION):
        logged, actual = logged_alias(entries, alias), registry.alias(alias)
        if logged != actual and alias not in unfinished:
            yield f"log: {alias} names {named(actual)}, the log says {named(logged)}"


def _data_problems(project: Project, version: ModelVersion, record: Record) -> Iterator[str]:
    from flows.data.dataset import DatasetVersion
    from flows.data.fetch import check_stored

    for domain in record.domains_at(version.number):
        wanted = DatasetVersion(
            domain=domain.name,
            path=domain.path,
            md5=domain.dvc_md5,
            git_rev=domain.git_rev,
            repository=domain.repository,
        )
        try:
            with exclusive(project.workspace):
                check_stored(project.workspace, project.settings.watch, wanted)
        except CopalError as error:
            yield f"data of {domain.name}: {error}"
