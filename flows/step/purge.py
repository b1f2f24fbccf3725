"""Purging a withdrawn domain: what is kept of its data is deleted, and what cannot be deleted is named.

Its contribution is deleted from every version that holds one, and so is every running sum that contains it. No later
step needs them, for the head is without the domain. Run folders and fetched data may hold some of it, so all of them
are deleted but the data of domains in use: steps make and fetch them again. Weights that were computed with the domain
stay, for no version is deleted here; these versions are the traces.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from itertools import chain

from copal.files import freed_bytes
from flows.data.fetch import drop_copies
from flows.lineage.entries import PurgeDetails
from flows.project import Project, append_log, read_log
from flows.step.staging import folders_of_nodes, run_folders

__all__ = ["Purged", "purge_domain"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Purged:
    """What a purge did.

    Attributes:
        domain: its name.
        deleted: the versions whose contribution of the domain is deleted, by this purge or an earlier one.
        traces: the versions whose weights were computed with the domain's data; those of `deleted` are among them.
        size: bytes that this purge freed.
    """

    domain: str
    deleted: tuple[int, ...]
    traces: tuple[int, ...]
    size: int


def purge_domain(project: Project, domain: str, why: str) -> Purged:
    """Delete what is kept of a withdrawn domain, at whatever data version, and write it into the log.

    A purge that was killed is completed by the next one. Only for who holds the lineage and the workspace's lock.

    Raises:
        RegistryError: the artifact store does not let it be deleted.
        LineageError: a record or the log was altered.
    """
    registry = project.registry
    head = registry.head()
    assert head is not None
    gone = next(entry for entry in reversed(registry.record(head).withdrawn) if entry.name == domain)
    deleted, traces, size = [], [], 0
    for folder in chain(run_folders(project), (folder for folder, _ in folders_of_nodes(project))):
        size += freed_bytes(folder)
        shutil.rmtree(folder)
    for version in (*registry.deleted(), *registry.versions()):
        record = registry.record(version)
        held = next((entry for entry in record.domains if entry.name == domain), None)
        if held is None:
            continue
        traces.append(version.number)
        size += registry.drop_sum(version)
        if held.contribution_version is None:
            deleted.append(version.number)
            size += registry.drop_contribution(version)
    heads = [lineage.record(newest) for lineage in registry.lineages() if (newest := lineage.head())]
    size += drop_copies(project.workspace.cache, {entry.dvc_md5 for record in heads for entry in record.domains})
    registry.sweep()
    details = PurgeDetails(domain=domain, dvc_md5=gone.dvc_md5, deleted=tuple(deleted), traces=tuple(traces))
    if not any(entry.kind == "purge" and entry.details == details for entry in read_log(project)):
        append_log(project, "purge", why=why, details=details)
    return Purged(domain=domain, deleted=tuple(deleted), traces=tuple(traces), size=size)
