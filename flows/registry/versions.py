"""A model version as the registry shows it, its tags, and which of those created are versions of the lineage."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from flows.lineage.files import CONTRIBUTION_FOLDER, SUM_FOLDER
from flows.lineage.record import Record
from flows.registry.errors import RegistryError
from flows.registry.store import pages

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from flows.registry.store import Store

__all__ = [
    "DROPPED",
    "GATES",
    "LINKED",
    "LOG_ENTRY",
    "LOG_HEAD",
    "WHY",
    "ModelVersion",
    "Snapshot",
    "created",
    "linked",
    "look",
    "look_at_aliases",
    "published",
    "tags_of",
]

DROPPED = {SUM_FOLDER: "copal.sum_dropped", CONTRIBUTION_FOLDER: "copal.contribution_dropped"}
GATES, LOG_ENTRY, WHY = "copal.gates", "copal.log_entry", "copal.why"
_WITHDRAWN, _PARENT, _LOGGED = "copal.withdrawn", "copal.parent_version", "copal.logged_model"
LOG_HEAD = "copal.log_head"  # the tag that anchors the ledger's log
LINKED = "mlflow.modelVersions"  # MLflow's tag on a logged model: the versions made of it


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
            `Registry.show_gates` on, `copal.sum_dropped` from `Registry.drop_sum` on, and
            `copal.contribution_dropped` from `Registry.drop_contribution` on. A version that withdrew a domain has
            `copal.withdrawn` (its name) and `copal.why` in place of the first three.
        run_id: of the MLflow run that made it.
        location: URI of the folder with `model/`, `state/` and `lineage.json`; see `Registry.folder`.
    """

    number: int
    aliases: tuple[str, ...]
    tags: Mapping[str, str]
    run_id: str | None
    location: str

    @property
    def digest(self) -> str:
        """SHA-256 of its record, as registered."""
        return self.tags["copal.lineage_digest"]

    @property
    def parent(self) -> int | None:
        """Number of the parent version; None at the root."""
        number = self.tags.get("copal.parent_version")
        return None if number is None else int(number)

    @property
    def key(self) -> str | None:
        """Of the step that made it; None at the root."""
        return self.tags.get("copal.key")

    @property
    def gates(self) -> str | None:
        """`passed` or `failed`; None where its gates never ran, or not to their end."""
        return self.tags.get(GATES)

    @property
    def log_entry(self) -> int:
        """Number of the log entry with the gate results that it shows; 0 for none."""
        number = self.tags.get(LOG_ENTRY, "")
        return int(number) if number.isdecimal() else 0  # of one that was edited by hand, the results are shown anew

    @property
    def concluded(self) -> bool:
        """Whether nothing is left to do for it; the dense base has no gates."""
        return self.parent is None or self.gates is not None

    @property
    def dropped(self) -> dict[str, bool]:
        """What `flows.lineage.files.verify_files` has to know of what was dropped."""
        return {"sum_dropped": self.sum_dropped, "contribution_dropped": self.contribution_dropped}

    @property
    def sum_dropped(self) -> bool:
        """Whether its running sum was dropped: missing files of it are no damage."""
        return DROPPED[SUM_FOLDER] in self.tags

    @property
    def contribution_dropped(self) -> bool:
        """Whether its contribution was purged: missing files of it are no damage."""
        return DROPPED[CONTRIBUTION_FOLDER] in self.tags

    @property
    def withdrawn(self) -> str | None:
        """The domain that it withdrew; None where it withdrew none."""
        return self.tags.get(_WITHDRAWN)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A registered model at one moment.

    Attributes:
        there: whether MLflow knows the model at all.
        every: all versions of it that copal made, oldest first, those that lost a race included.
        aliases: name -> number of the version.
        tags: of the model itself.
    """

    there: bool
    every: tuple[ModelVersion, ...]
    aliases: Mapping[str, int]
    tags: Mapping[str, str]

    @property
    def versions(self) -> list[ModelVersion]:
        """The versions of the lineage, oldest first, each with its aliases."""
        names: dict[int, list[str]] = {}
        for alias, number in self.aliases.items():
            names.setdefault(number, []).append(alias)
        return published([replace(each, aliases=tuple(sorted(names.get(each.number, [])))) for each in self.every])

    def with_tags(self, number: int, tags: Mapping[str, str]) -> Snapshot:
        """The same after these tags were set on version `number`."""
        return replace(
            self,
            every=tuple(
                replace(each, tags={**each.tags, **tags}) if each.number == number else each for each in self.every
            ),
        )

    def with_alias(self, name: str, number: int | None) -> Snapshot:
        """The same after an alias was moved to version `number`, or deleted (None)."""
        others = {alias: named for alias, named in self.aliases.items() if alias != name}
        return replace(self, aliases=others if number is None else {**others, name: number})


def look(store: Store, client: MlflowClient) -> Snapshot:
    """The registered model as it is now: two calls of MLflow, one where there is no such model."""
    model = store.model(client)
    if model is None:
        return Snapshot(there=False, every=(), aliases={}, tags={})
    aliases = {alias: int(number) for alias, number in model.aliases.items()}
    return Snapshot(there=True, every=created(store, client), aliases=aliases, tags=dict(model.tags))


def look_at_aliases(store: Store, client: MlflowClient, before: Snapshot) -> Snapshot:
    """The registered model as it was seen before, with its aliases and own tags as they are now: one call."""
    model = store.model(client)
    if model is None:
        return replace(before, there=False, every=(), aliases={}, tags={})
    aliases = {alias: int(number) for alias, number in model.aliases.items()}
    return replace(before, aliases=aliases, tags=dict(model.tags))


def created(store: Store, client: MlflowClient) -> tuple[ModelVersion, ...]:
    """Every version of the model that copal made, oldest first, those that lost a race included; without aliases."""
    query = f"name = '{store.model_name}'"
    found = [
        ModelVersion(
            number=int(version.version),
            aliases=(),
            tags=_checked(store.model_name, int(version.version), dict(version.tags)),
            run_id=version.run_id or None,
            location=version.source,
        )
        for version in pages(lambda token: client.search_model_versions(query, page_token=token))
        if "copal.lineage_digest" in version.tags  # anybody may register other things under this name
    ]
    return tuple(sorted(found, key=lambda version: version.number))


def linked(store: Store, client: MlflowClient) -> list[ModelVersion]:
    """Every version that copal has ever published and that MLflow keeps the files of, by what their artifacts say."""
    experiment = client.get_experiment_by_name(store.model_name)
    if experiment is None:
        return []
    places = [experiment.experiment_id]
    found = [
        ModelVersion(
            number=link["version"],
            aliases=(),
            tags={
                **{name: value for name, value in model.tags.items() if name.startswith("copal.")},
                _LOGGED: model.model_id,
            },
            run_id=None,
            location=model.artifact_location,
        )
        for model in pages(lambda token: client.search_logged_models(places, page_token=token))
        if "copal.lineage_digest" in model.tags
        for link in json.loads(model.tags.get(LINKED, "[]"))
        if link["name"] == store.model_name
    ]
    return sorted(found, key=lambda version: version.number)


def _checked(name: str, number: int, tags: Mapping[str, str]) -> Mapping[str, str]:
    """The tags of a version, where somebody has not made them useless by hand."""
    bad = [tag for tag in (_LOGGED, "copal.base_fingerprint") if not tags.get(tag)]
    parent = tags.get(_PARENT)
    bad += [] if parent is None or parent.isdecimal() else [_PARENT]
    if bad:
        raise RegistryError(
            f"version {number} of {name}: somebody edited or deleted its tag {bad[0]} in MLflow; the artifacts of the "
            f"version (its logged model, and lineage.json there) have the right value: set it back"
        )
    return tags


def published(versions: Sequence[ModelVersion]) -> list[ModelVersion]:
    """Of versions in rising order, those of the lineage: a version made of a parent older than its predecessor lost."""
    shown: list[ModelVersion] = []
    for version in versions:
        if not shown or (version.parent or 0) >= shown[-1].number:
            shown.append(version)
    if shown:
        shown[-1] = replace(shown[-1], aliases=(*shown[-1].aliases, "latest"))
    return shown


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
