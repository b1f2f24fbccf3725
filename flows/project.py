"""A project: a workspace, its settings, its registry and its ledger, opened once at the edge and handed on.

Everything that copal does is done to a project. This file also has what needs registry and ledger together: whoever
takes the lineage first publishes what a dead holder had sealed; and the log is in the ledger, its anchor in the
registry, so that neither of the two can be rewritten alone. And it says when a refusal of data still holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from copal.config import fingerprint
from flows.cache import Cache
from flows.data.clones import is_url
from flows.data.dataset import DatasetVersion, UnusableDataError
from flows.data.fetch import fetch_version
from flows.data.workspaces import workspace_folder
from flows.ledger import ALIASES, LINEAGE, Claim, Ledger, LedgerError, Refusal
from flows.lineage.chain import anchor_at, anchor_problems, not_anchored
from flows.lineage.entries import Details, Entry, WithdrawalDetails
from flows.lineage.fields import LineageError
from flows.lineage.history import History, Version
from flows.machine import code_version
from flows.params import load_settings
from flows.registry.registry import Registry, open_registry
from flows.registry.versions import WHY
from flows.settings import Settings
from flows.workspace import Workspace, open_workspace

__all__ = [
    "Project",
    "append_log",
    "complete_log",
    "data_of",
    "hold_aliases",
    "hold_lineage",
    "open_project",
    "project_of",
    "read_history",
    "read_log",
    "refusals",
    "refusing",
]

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Project:
    """A workspace with its settings, and the lineage that it grows: versions in the registry, claims and log in the
    ledger.

    Attributes:
        url: where the workspace was cloned from; None where it is a folder of this machine.
    """

    workspace: Workspace
    settings: Settings
    registry: Registry
    ledger: Ledger
    cache: Cache
    url: str | None = None

    @property
    def place(self) -> str:
        """By which the project can be opened again, in another process too: its URL, else its folder."""
        return self.url or str(self.workspace.root)

    @property
    def name(self) -> str:
        """Of the lineage: the registered model."""
        return self.settings.model.name


def open_project(folder: Path | str) -> Project:
    """The project in the workspace `folder`, or in a clone of the URL that it is (see `flows.data.workspaces`); no
    store is opened before it is asked for something.

    Raises:
        DatasetError: the URL cannot be cloned.
        WorkspaceError: `folder` is no workspace.
        SettingsError: its params.yaml is bad.
    """
    workspace = open_workspace(workspace_folder(str(folder)))
    found = project_of(workspace, load_settings(workspace.params))
    return replace(found, url=str(folder)) if is_url(str(folder)) else found


def project_of(workspace: Workspace, settings: Settings) -> Project:
    """The project of a workspace with these settings."""
    cache = Cache(workspace.cache, settings.cache.size)
    ledger = Ledger(workspace.ledger_uri(settings), settings.model.name)
    return Project(workspace, settings, open_registry(workspace, settings, cache), ledger, cache)


@contextmanager
def hold_lineage(project: Project, what: str, tell: Tell | None = None) -> Iterator[Claim]:
    """Be the only one who works on the lineage; waits as long as somebody else does.

    What a dead holder was about to publish is published first.

    Args:
        what: the work in a few words, for people who want to know who holds the lineage.
        tell: called with a line when this has to wait.

    Raises:
        LedgerError, RegistryError: a store does not answer.
    """
    with project.ledger.hold(LINEAGE, what, lease=project.settings.run.lease, tell=tell) as claim:
        project.registry.refresh()
        if claim.inherited:
            project.registry.adopt(claim.inherited)
            claim.unseal()
        yield claim


@contextmanager
def hold_aliases(project: Project, what: str, tell: Tell | None = None) -> Iterator[Claim]:
    """Be the only one who moves aliases of the lineage. Held for moments, so that a rollback waits for no step."""
    with project.ledger.hold(ALIASES, what, lease=project.settings.run.lease, tell=tell) as claim:
        project.registry.refresh_aliases()
        yield claim


def data_of(project: Project, version: DatasetVersion) -> Path:
    """A folder with the data of a dataset version: see `flows.data.fetch.fetch_version`."""
    return fetch_version(project.cache, project.workspace, project.settings.watch, version)


def read_log(project: Project) -> list[Entry]:
    """What happened to the versions after they were made, oldest first; checked against its anchor in the registry.

    Raises:
        LineageError: it was altered.
        LedgerError, RegistryError: a store cannot be read.
    """
    entries = project.ledger.log()
    problems = anchor_problems(entries, project.registry.log_anchor())
    if problems:
        raise LineageError(f"the log of {project.name}: {problems[0]}; bring ledger and registry back from one backup")
    return entries


def append_log(
    project: Project,
    kind: str,
    *,
    version: int | None = None,
    from_version: int | None = None,
    to_version: int | None = None,
    why: str | None = None,
    details: Details,
    after: int | None = None,
) -> Entry:
    """Append an entry to the log and anchor it; see `flows.ledger.Ledger.append`.

    Raises:
        LogMovedError: there are more entries than `after`; nothing was appended.
        LineageError: the log was altered.
        LedgerError, RegistryError: a store fails. An entry that was appended and not anchored counts; the next one
            anchors it.
    """
    read_log(project)  # it raises where the log was cut off: such a log must not get a new anchor
    entry = project.ledger.append(
        kind,
        version=version,
        from_version=from_version,
        to_version=to_version,
        why=why,
        details=details,
        after=after,
    )
    project.registry.anchor_log(anchor_at(entry))
    return entry


def complete_log(project: Project) -> list[Entry]:
    """Complete the log: an entry for the head's withdrawal where it is missing, and the anchor of the newest entry.

    Every withdrawal comes into the log here: right after it, or, where that process was killed, when the next one takes
    the lineage. Only for the holder of the lineage.

    Returns:
        The log.

    Raises:
        LineageError: it was altered.
        LedgerError, RegistryError: a store fails.
    """
    registry, entries = project.registry, read_log(project)
    if not_anchored(entries, registry.log_anchor()):
        registry.anchor_log(anchor_at(entries[-1]))
    head = registry.head()
    gone = registry.record(head).withdraws if head is not None and head.withdrawn is not None else None
    if head is None or gone is None:
        return entries
    if any(entry.kind == "withdrawal" and entry.version == head.number for entry in entries):
        return entries
    details = WithdrawalDetails(domain=gone.name, dvc_md5=gone.dvc_md5)
    return [*entries, append_log(project, "withdrawal", version=head.number, why=head.tags.get(WHY), details=details)]


def refusals(project: Project) -> Mapping[str, Refusal]:
    """The refusals of data that still hold, by domain: the settings and copal are those that refused it.

    Whoever reads this compares the md5. It only saves tries: where the ledger does not answer there are none, and what
    needs it says so.
    """
    found: Mapping[str, Refusal] = {}
    with suppress(LedgerError):
        found = project.ledger.refusals()
    refused_by = _refused_by(project) if found else ""
    return {domain: refusal for domain, refusal in found.items() if refusal.settings == refused_by}


@contextmanager
def refusing(project: Project, domain: str, dvc_md5: str) -> Iterator[None]:
    """Write down where the data of a domain turns out to be unusable, and forget that where it does not."""
    try:
        yield
    except UnusableDataError as error:
        with suppress(LedgerError):
            project.ledger.refuse(domain, dvc_md5=dvc_md5, settings=_refused_by(project), reason=str(error))
        raise
    with suppress(LedgerError):
        project.ledger.forget_refusal(domain)


def _refused_by(project: Project) -> str:
    """Fingerprint of what, beside the data, may refuse it: settings, and a copal that may read what another did not."""
    return fingerprint([project.settings.fingerprint(), code_version()["version"]])


def read_history(project: Project) -> History:
    """The history of the lineage, read once.

    Raises:
        LineageError: a record or the log is damaged or was altered.
        LedgerError, RegistryError: a store cannot be read.
    """
    versions = []
    for version in project.registry.versions():
        record = project.registry.record(version)
        versions.append(
            Version(
                number=version.number,
                parent=version.parent,
                aliases=version.aliases,
                tags=dict(version.tags),
                digest=record.digest,
                record=record,
                signature=version.tags.get("copal.signature"),
            )
        )
    return History(model=project.name, versions=tuple(versions), log=tuple(read_log(project)))
