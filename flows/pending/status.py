"""What a workspace knows: the versions of its lineage, their figures, and what is pending."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flows.project import Project, read_log

if TYPE_CHECKING:
    from flows.data.dataset import DatasetVersion
    from flows.lineage.entries import Entry
    from flows.lineage.record import Record
    from flows.pending.plan import Plan
    from flows.registry.versions import ModelVersion

__all__ = [
    "held_back",
    "lineages",
    "plain_dataset",
    "status",
]


def status(project: Project) -> dict[str, Any]:
    """The state of a workspace as plain JSON values.

    `model`: the name of the lineage. `versions`, oldest first, each with version, parent, domain, dvc_md5, git_rev
    (these three None at the root, and where it withdrew a domain), withdrawn (that domain, or None), sparsity (zeros as
    counted, a share), weights_back (None where the parent is dense), perplexity and dense_perplexity ({domain: value}),
    what `flows.lineage.scores.standing` makes of them, seconds ({statistics, solve, evaluate}), gates (passed or
    failed; None where they never ran), failed ({gate: why}) and aliases. `pending`, in the order in which the watcher
    would take them, each with domain, dvc_md5 and git_rev. `waiting` for data that nobody has pushed, the same with
    tries, since and next_try. `refused` for data that cannot be used with these settings, the same with reason and
    since. `notes` and `problems`: see `flows.pending.plan.Plan`.

    Raises:
        DatasetError: the repository cannot be read.
        RegistryError: the registry cannot be read.
        LineageError: a version's record is damaged, or the log was altered.
    """
    from flows.pending.plan import plan

    registry = project.registry
    found = plan(project)
    entries = read_log(project)
    return {
        "model": project.name,
        "versions": [_version(version, registry.record(version), entries) for version in registry.versions()],
        "pending": [plain_dataset(version) for version in found.pending],
        **held_back(found),
    }


def held_back(found: Plan) -> dict[str, Any]:
    """What would not run, as plain JSON values: `waiting`, `refused`, `notes` and `problems` of `status`."""
    return {
        "waiting": [plain_dataset(version) | wait.as_dict() for version, wait in found.waiting],
        "refused": [
            plain_dataset(version) | {"reason": refusal.reason, "since": refusal.since.isoformat(timespec="seconds")}
            for version, refusal in found.refused
        ],
        "notes": list(found.notes),
        "problems": list(found.problems),
    }


def lineages(project: Project) -> list[dict[str, Any]]:
    """Every lineage of the registry as plain JSON values, by name.

    Each with model, head and versions (numbers), domains (of the head, by name) and aliases ({alias: number}).

    Raises:
        RegistryError: the registry cannot be read.
        LineageError: the record of a head is damaged.
    """

    found = []
    for registry in project.registry.lineages():
        versions = registry.versions()
        head = versions[-1]
        found.append(
            {
                "model": registry.model_name,
                "head": head.number,
                "versions": [version.number for version in versions],
                "domains": [domain.name for domain in registry.record(head).domains],
                "aliases": {alias: version.number for version in versions for alias in version.aliases},
            }
        )
    return found


def plain_dataset(version: DatasetVersion) -> dict[str, Any]:
    """What `status` tells of a dataset version."""
    return {"domain": version.domain, "dvc_md5": version.md5, "git_rev": version.git_rev}


def _version(version: ModelVersion, record: Record, entries: Sequence[Entry]) -> dict[str, Any]:
    from flows.gates.champion import gates_entry
    from flows.lineage.scores import standing

    step = record.step
    entry = gates_entry(version, entries)
    failed = entry.details.failed if entry else ()
    return {
        "version": version.number,
        "parent": version.parent,
        "domain": step and step.name,
        "dvc_md5": step and step.dvc_md5,
        "git_rev": step and step.git_rev,
        "withdrawn": version.withdrawn,
        "sparsity": record.sparsity.counted,
        "weights_back": record.weights_back,
        "perplexity": dict(record.perplexity),
        "dense_perplexity": dict(record.dense_perplexity),
        **standing(record),
        "seconds": record.seconds.as_json(),
        "gates": version.gates,
        "failed": {gate.name: gate.detail for gate in failed},
        "aliases": list(version.aliases),
    }
