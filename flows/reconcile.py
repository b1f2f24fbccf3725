"""Desired against actual: which dataset versions the head of the lineage does not know yet.

Desired is, for each domain, the version at the watched branch; actual is the version in the head's record. What differs
is pending, in the order in which the pointers last changed. Nothing here depends on events, so a missed one, a
force-push, a revert or ten versions at once need no special case. Neither Prefect nor torch is needed to know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from copal.errors import DataError
from flows.settings import Settings, Workspace, check_domain_name

if TYPE_CHECKING:
    from flows.datasets import DatasetVersion
    from flows.registry import ModelVersion, Registry

__all__ = ["Plan", "plan"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a check found.

    Attributes:
        head: the newest version; None before a base is registered.
        pending: dataset versions to adapt to, oldest change first.
        notes: what changes nothing but should be said, such as a pointer that is gone.
        problems: what keeps a dataset from being adapted to, such as a name that no domain may have.
    """

    head: ModelVersion | None
    pending: tuple[DatasetVersion, ...]
    notes: tuple[str, ...]
    problems: tuple[str, ...]


def plan(workspace: Workspace, settings: Settings, registry: Registry) -> Plan:
    """Compare the watched branch with the head's record; changes nothing.

    Raises:
        DatasetError: the repository cannot be read.
        RegistryError: the registry cannot be read.
    """
    from flows.datasets import dataset_versions

    head = registry.head()
    known = {domain["name"]: domain["dvc_md5"] for domain in registry.record(head)["domains"]} if head else {}
    desired = dataset_versions(workspace.root, settings.watch.branch or "HEAD")
    pending, problems = [], []
    for version in desired:
        try:
            check_domain_name(version.domain)
        except DataError as error:
            problems.append(f"{version.path}: {error}")
            continue
        if known.get(version.domain) != version.md5:
            pending.append(version)
    gone = sorted(known.keys() - {version.domain for version in desired})
    notes = tuple(f"data/{domain} is no longer tracked here; the model keeps what it knows of it" for domain in gone)
    return Plan(head=head, pending=tuple(pending), notes=notes, problems=tuple(problems))
