"""Which dataset versions the head of the lineage does not know yet: what is desired, compared with what is there.

Desired is, for each domain, the version at the watched branch; actual is the version in the head's record. What differs
is pending, in the order in which the pointers last changed. Nothing here depends on events, so a missed one, a
force-push, a revert or ten versions at once need no special case. Neither Prefect nor torch is needed to know.

Data that was looked for and not found is not tried again for a while (`flows.pending.missing_data`), and data that was
refused not before it or the settings change (`flows.project.refusals`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from copal.errors import DataError
from flows.pending.changes import changes_note
from flows.pending.missing_data import Waiting, waiting
from flows.project import Project, refusals
from flows.settings import check_domain_name

if TYPE_CHECKING:
    from flows.data.dataset import DatasetVersion
    from flows.ledger import Refusal
    from flows.registry.versions import ModelVersion

__all__ = ["Plan", "plan", "refusal_text"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a check found.

    Attributes:
        head: the newest version; None before a base is registered.
        pending: dataset versions to adapt to now, oldest change first.
        waiting: dataset versions whose data was missing, and which are not due again yet.
        refused: dataset versions whose data cannot be used with these settings.
        notes: what changes nothing but should be said, such as a pointer that is gone, or settings that start nothing.
        problems: what keeps a dataset from being adapted to, such as a name that no domain may have.
    """

    head: ModelVersion | None
    pending: tuple[DatasetVersion, ...]
    waiting: tuple[tuple[DatasetVersion, Waiting], ...]
    refused: tuple[tuple[DatasetVersion, Refusal], ...]
    notes: tuple[str, ...]
    problems: tuple[str, ...]


def plan(project: Project, now: datetime | None = None) -> Plan:
    """Compare the watched branch with the head's record; changes nothing but a clone of another repository.

    Args:
        now: the time that decides whether a waiting dataset version is due; None: the present.

    Raises:
        DatasetError: the repository cannot be read, or reached.
        RegistryError: the registry cannot be read.
    """
    from flows.data.commits import in_history, watched_revision
    from flows.data.repositories import data_root
    from flows.data.versions import dataset_versions

    workspace, settings, registry = project.workspace, project.settings, project.registry
    now = now or datetime.now(UTC)
    head = registry.head()
    record = registry.record(head) if head else None
    known = {entry.name: entry for entry in record.domains_at(head.number)} if head and record else {}
    withdrawn = {(entry.name, entry.dvc_md5) for entry in record.withdrawn} if record else set()
    root, branch = data_root(workspace, settings.watch), settings.watch.branch or "HEAD"
    watched = watched_revision(root, settings.watch.branch)
    desired = dataset_versions(root, watched)
    missing, unusable = waiting(workspace, settings.model.name), refusals(project)
    pending, later, useless, notes, problems = [], [], [], [], []
    for version in desired:
        try:
            check_domain_name(version.domain)
        except DataError as error:
            problems.append(f"{version.path}: {error}")
            continue
        entry = known.get(version.domain)
        if entry and entry.repository == version.repository and not in_history(root, entry.git_rev, watched):
            notes.append(
                f"{version.path}: commit {entry.git_rev[:10]}, of which version {entry.contribution_version} was made, "
                f"is not in the history of {branch} (any more); the lineage keeps it"
            )
        if entry and entry.dvc_md5 == version.md5:
            continue
        if (version.domain, version.md5) in withdrawn:
            notes.append(
                f"{version.path} at {version.md5[:10]} was withdrawn; it comes back only as another version, "
                f"or by `copal adapt {version.domain}`"
            )
            continue
        wait, refusal = missing.get(version.domain), unusable.get(version.domain)
        if refusal and refusal.dvc_md5 == version.md5:
            useless.append((version, refusal))
        elif wait and wait.dvc_md5 == version.md5 and not wait.is_due(now):
            later.append((version, wait))
        else:
            pending.append(version)
    if head and record and (note := changes_note(record, settings, head.number)):
        notes.append(note)
    notes += _named_twice(desired)
    gone = sorted(known.keys() - {version.domain for version in desired})
    versions = registry.versions()
    parents = {version.parent for version in versions if version.parent is not None}
    notes += [
        f"version {number} was deleted in MLflow; its files are there still, and steps use them"
        for number in sorted(parents - {version.number for version in versions})
    ]
    notes += [
        f"data/{domain} is no longer tracked here; the model keeps what it knows of it; to take that out: "
        f"`copal withdraw {domain} --why TEXT`"
        for domain in gone
    ]
    return Plan(
        head=head,
        pending=tuple(pending),
        waiting=tuple(later),
        refused=tuple(useless),
        notes=tuple(notes),
        problems=tuple(problems),
    )


def _named_twice(desired: Sequence[DatasetVersion]) -> Iterator[str]:
    """A line on each dataset that is there under several names: the model would count it several times."""
    names: dict[str, list[str]] = {}
    for version in desired:
        names.setdefault(version.md5, []).append(version.path)
    for md5, paths in names.items():
        if len(paths) > 1:
            yield f"{' and '.join(paths)} hold the same data (md5 {md5[:10]}): as domains, each counts by itself"


def refusal_text(version: DatasetVersion, refusal: Refusal) -> str:
    """One line on a dataset version that is not tried again."""
    return (
        f"{version.path} at {version.md5[:10]} was refused, and is not tried again before it or the settings change: "
        f"{refusal.reason}"
    )
