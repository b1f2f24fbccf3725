"""Which step there is to take: the version that it builds on, the domain that it adds or takes out, and its key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from copal.errors import CopalError
from flows.data.recorded import dataset_of
from flows.lineage.keys import step_key, withdrawal_key
from flows.lineage.record import Domain, LeftOut
from flows.project import Project
from flows.settings import check_domain_name

if TYPE_CHECKING:
    from flows.data.dataset import DatasetVersion
    from flows.registry.registry import Registry
    from flows.registry.versions import ModelVersion
    from flows.step.gang import Helpers

__all__ = [
    "UNFINISHED",
    "Inputs",
    "NoBaseError",
    "Step",
    "WithdrawError",
    "find_step",
    "find_withdrawal",
    "inputs_of",
    "run_folder",
    "step_on",
]


UNFINISHED = "unfinished"
_LONGEST_WHY = 1000  # characters


class NoBaseError(CopalError):
    """The lineage has no root yet."""


class WithdrawError(CopalError):
    """A domain cannot be withdrawn as things are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One step, resolved: what it builds on and what it adds, or takes out.

    Attributes:
        model: name of the lineage.
        head: number of the version that it builds on.
        base: the dense base model's folder; `base_fingerprint`: of that folder.
        parent: folder of the head (model/, state/); None where the head is the dense base itself.
        states: version -> state folder, of every version whose contribution the head's state names.
        run: the step's own folder, named by the lineage and the key.
        version: the dataset version to adapt to, or to take out.
        key: names the step.
        earlier: the other domains in the head's state.
        withdraws: whether `version` is taken out.
        why: the reason of a withdrawal, in the words of whoever asked for it.
        left_out: the documents that the domain's windows do without, where a record says so; None: it is to be found.
        helpers: the other machines that take it too.
    """

    model: str
    head: int
    base: Path
    base_fingerprint: str
    parent: Path | None
    states: Mapping[int, Path]
    run: Path
    version: DatasetVersion
    key: str
    earlier: tuple[Domain, ...]
    withdraws: bool = False
    why: str | None = None
    left_out: LeftOut | None = None
    helpers: Helpers | None = None

    @property
    def new(self) -> str | None:
        """The domain that it adds or replaces; None where it takes one out."""
        return None if self.withdraws else self.version.domain

    @property
    def out(self) -> Path:
        """Where the new version is staged."""
        return self.run / "version"

    @property
    def unfinished(self) -> Path:
        """What pruning goes on from where it was killed, block by block (`copal.resume`)."""
        return self.run / UNFINISHED


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What a step reads of the registry, on this machine: see `Step`."""

    base: Path
    base_fingerprint: str
    parent: Path | None
    states: Mapping[int, Path]


def inputs_of(registry: Registry, parent: ModelVersion) -> Inputs:
    """What a step from `parent`, a version of the lineage, reads; fetched where it is not here.

    What it computes with is hashed first: weights here, the state's manifest here and its shards when they are read.

    Raises:
        RegistryError: a file is not what was registered.
    """
    root = registry.root()
    assert root is not None
    record = registry.record(parent)
    known = record.domains_at(parent.number)
    versions = {entry.contribution_version for entry in known if entry.contribution_version is not None}
    return Inputs(
        base=registry.checked_folder(root, "model/") / "model",
        base_fingerprint=record.base.fingerprint,
        parent=registry.checked_folder(parent, "model/", "state/manifest.json") if known else None,
        states={number: registry.folder(registry.kept(number)) / "state" for number in sorted(versions)},
    )


def find_step(project: Project, domain: str, rev: str | None) -> tuple[ModelVersion, DatasetVersion, str] | None:
    """What a step would build on and adapt to, and the key that names it. Fetches nothing.

    None where the head knows the data already, and was made with these settings.

    Raises:
        DataError: no domain may have that name.
        DatasetError: the domain is not tracked at `rev`.
        NoBaseError: no base is registered yet.
        LineageConflictError: the lineage has another sparsity.
        SigningError: versions are to be signed, and cannot be.
    """
    from flows.data.commits import watched_revision
    from flows.data.repositories import data_root
    from flows.data.versions import dataset_version

    check_domain_name(domain)
    watch = project.settings.watch
    root = data_root(project.workspace, watch, rev)
    version = dataset_version(root, domain, rev or watched_revision(root, watch.branch))
    head = _head(project)
    record = project.registry.record(head)
    known = {entry.name: entry for entry in record.domains_at(head.number)}
    settings_fingerprint = project.settings.fingerprint()
    same_data = domain in known and known[domain].dvc_md5 == version.md5
    if same_data and record.settings_fingerprint == settings_fingerprint:
        return None
    return head, version, step_key(head.number, domain, version.md5, settings_fingerprint)


def find_withdrawal(project: Project, domain: str, why: str) -> tuple[ModelVersion, DatasetVersion, str] | None:
    """What such a step would build on and take out, and the key that names it. Fetches nothing.

    None where the domain was withdrawn already.

    Raises:
        DataError: no domain may have that name.
        WithdrawError: the head does not know the domain, or knows nothing else; or `why` says nothing.
        NoBaseError: no base is registered yet.
        LineageConflictError: the lineage has another sparsity.
    """
    check_domain_name(domain)
    if not 0 < len(why.strip()) <= _LONGEST_WHY:
        raise WithdrawError(f"say why {domain} is withdrawn, in 1 to {_LONGEST_WHY} characters: the log keeps it")
    head = _head(project)
    record = project.registry.record(head)
    known = {entry.name: entry for entry in record.domains_at(head.number)}
    if domain not in known:
        if any(entry.name == domain for entry in record.withdrawn):
            return None
        raise WithdrawError(
            f"version {head.number} of {project.name} does not know {domain}; "
            f"it knows {', '.join(known) or 'no domain'}"
        )
    if len(known) == 1:
        root = project.registry.root()
        assert root is not None
        raise WithdrawError(
            f"{domain} is the only domain of version {head.number}: without it, the model is the dense base, "
            f"version {root.number}; serve that one, or adapt to another domain first"
        )
    version = dataset_of(known[domain])
    key = withdrawal_key(head.number, domain, version.md5, project.settings.fingerprint())
    return head, version, key


def run_folder(project: Project, key: str) -> Path:
    """The step's own folder."""
    return project.workspace.runs / f"{project.name}-{key[:16]}"


def _head(project: Project) -> ModelVersion:
    registry = project.registry
    head = registry.head()
    if head is None:
        raise NoBaseError(
            f"{project.name} has no base model yet: run `copal init {project.workspace.root} --base SOURCE`"
        )
    registry.check_sparsity(head, project.settings.prune.sparsity)
    registry.check_signing()
    return head


def step_on(
    registry: Registry,
    parent: ModelVersion,
    inputs: Inputs,
    version: DatasetVersion,
    key: str,
    run: Path,
    *,
    withdraws: bool = False,
    why: str | None = None,
) -> Step:
    """The step from `parent`, a version of the lineage, with its `inputs_of`; see `Step`."""
    known = registry.record(parent).domains_at(parent.number)
    return Step(
        head=parent.number,
        base=inputs.base,
        base_fingerprint=inputs.base_fingerprint,
        parent=inputs.parent,
        states=inputs.states,
        model=registry.model_name,
        run=run,
        version=version,
        key=key,
        earlier=tuple(entry for entry in known if entry.name != version.domain),
        withdraws=withdraws,
        why=why,
    )
