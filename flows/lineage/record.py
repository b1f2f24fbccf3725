"""The record of a model version: which base, data, settings and code made it, and what came out.

A record is written once, as `lineage.json` beside the weights. Its digest goes into the registry and into the record of
every child, so records form a hash chain: whoever alters one breaks the digests after it. It does not hold what comes
later (gates, aliases, its own version number). Pure: knows of no registry and no data tool.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import AfterValidator, ConfigDict, Field

from copal.bounded import read_json
from copal.config import fingerprint
from copal.files import json_text, write_atomic
from flows.lineage.fields import (
    Frozen,
    Hash64,
    JsonObject,
    LineageError,
    Must,
    Number,
    NumberOrNull,
    Perplexities,
    Sha256,
    Sha256OrNull,
    Text,
    TextOrNull,
    UtcTime,
    Whole,
    WholeOrNull,
    must_be,
    parse,
    shown,
)
from flows.lineage.figures import geometric_mean
from flows.lineage.tasks import TasksOfDomains

if TYPE_CHECKING:
    import copal.leakage

__all__ = [
    "RECORD_FILE",
    "SCHEMA",
    "Base",
    "Code",
    "Domain",
    "Layer",
    "LeftOut",
    "LineageError",
    "MatrixRow",
    "Parent",
    "Record",
    "Seconds",
    "Sparsity",
    "Withdrawn",
    "flatten",
    "parse_record",
    "read_record",
    "write_record",
]

SCHEMA: Final = "copal.lineage/2"
RECORD_FILE = "lineage.json"
_INSIDE = r"^(?!/)(?!(.*/)?\.\.(/|$))."  # of a relative path that stays where it is


class LeftOut(Frozen):
    """Documents of a domain that were passed over, since another domain had their text on the other side.

    Attributes:
        calibration, evaluation: by side, the beginnings of the SHA-256 of their identities.
    """

    calibration: Annotated[tuple[Hash64, ...], Field(strict=False), Must("a list of hashes")]
    evaluation: Annotated[tuple[Hash64, ...], Field(strict=False), Must("a list of hashes")]

    def __len__(self) -> int:
        return len(self.calibration) + len(self.evaluation)

    def as_hashes(self) -> copal.leakage.LeftOut:
        """As the algorithm takes it."""
        from copal.leakage import LeftOut

        return LeftOut(calibration=self.calibration, evaluation=self.evaluation)


class Domain(Frozen):
    """One domain of the sensitivity state, at the data version that the state holds.

    Attributes:
        path: of the data inside `repository`.
        dvc_md5: DVC's md5 of the data (`<md5>.dir` for a folder).
        git_rev: commit of `repository` that tracks `dvc_md5`.
        weight: of the domain in the sum of statistics.
        tokens, windows: what calibration read.
        contribution_version: model version whose state holds the contribution; None: the version of this record.
        evaluation_digest, evaluation_tokens: which tokens the perplexity was measured on (SHA-256), how many predicted.
        left_out: which documents its windows do without.
    """

    name: Text
    path: Text
    dvc_md5: Text
    git_rev: Text
    repository: Text
    weight: Number
    tokens: Whole
    windows: Whole
    contribution_version: WholeOrNull
    evaluation_digest: Text
    evaluation_tokens: Whole
    left_out: LeftOut = Field(default=LeftOut(calibration=(), evaluation=()), exclude_if=lambda left: not len(left))

    def made_in(self, version: int) -> int:
        """The version whose state holds the contribution, of a domain in the record of `version`."""
        return version if self.contribution_version is None else self.contribution_version


class Parent(Frozen):
    """The version that a step built on, and the digest of its record."""

    version: Whole
    digest: Sha256


class Base(Frozen):
    """The dense base checkpoint, and where it came from."""

    fingerprint: Text
    source: Text


class Withdrawn(Frozen):
    """A dataset version that was withdrawn and may not come back by itself."""

    name: Text
    dvc_md5: Text


class Sparsity(Frozen):
    """Share of zeros in the pruned linears.

    Attributes:
        target: a share, or a pattern such as "2:4"; None where nothing was pruned yet.
    """

    target: Annotated[Number | Text | None, Must("a share, a pattern or null")]
    counted: Number


class Seconds(Frozen):
    """What the parts of a step took."""

    statistics: Number
    solve: Number
    evaluate: Number

    @property
    def total(self) -> float:
        """Of all parts."""
        return self.statistics + self.solve + self.evaluate


class MatrixRow(Frozen):
    """Perplexities of a version by domain; `version` None: the version of this record."""

    version: WholeOrNull
    perplexity: Perplexities


class Layer(Frozen):
    """What a step did to one pruned linear; see `copal.step.LayerReport`.

    Attributes:
        weights_back: weights that were zero in the parent and are not now; None where the parent is dense.
        tokens: of the new domain that it read.
    """

    name: Text
    sparsity: Number
    layer_error_before: NumberOrNull
    layer_error_after: NumberOrNull
    response_shift: NumberOrNull
    damping: NumberOrNull
    tokens: Whole
    weights_back: WholeOrNull


class Code(Frozen):
    """The version of copal; where it ran from its git checkout, the commit and whether files were changed."""

    version: Text
    git_commit: TextOrNull
    dirty: Annotated[bool | None, Must("true, false or null")]


def _all_inside(files: Mapping[str, str]) -> Mapping[str, str]:
    if not all(re.search(_INSIDE, path) for path in files):
        raise must_be("paths of files inside the version's folder, each with its SHA-256")
    return files


class Record(Frozen):
    """The record of a version.

    Attributes:
        model: registered model name.
        parent: None for the root of the lineage, which has no `key` and `step` either.
        key: names the step, see `flows.lineage.keys`.
        step: the domain that this step added or replaced; None where it withdrew one.
        domains: every domain in the state, by name.
        withdrawn: in a record without a step, the last one is what this version withdrew.
        weights_back: weights that were zero in the parent and are not now; None when the parent is the dense root.
        perplexity, dense_perplexity: of this version and of the dense base, by domain.
        matrix: of every pruned version up to this one, oldest first.
        perplexity_before: of the new domain on the parent, before the step.
        tasks: domain -> task -> its figures; only of domains that have tasks.
        created: UTC time in ISO 8601.
        files: SHA-256 by path relative to the version's folder, see `flows.lineage.files.version_files`.
    """

    model_config = ConfigDict(title="lineage record")

    schema_: Annotated[Literal["copal.lineage/2"], Must(f"{SCHEMA!r}")] = Field(default=SCHEMA, alias="schema")
    model: Text
    parent: Annotated[Parent | None, Must("a JSON object with version and digest, or null")]
    base: Base
    key: Sha256OrNull
    step: Annotated[Domain | None, Must("a JSON object of a domain, or null")]
    domains: Annotated[tuple[Domain, ...], Field(strict=False), Must("a list of domains")]
    withdrawn: Annotated[tuple[Withdrawn, ...], Field(strict=False), Must("a list of dataset versions")]
    settings: JsonObject
    settings_fingerprint: Text
    sparsity: Sparsity
    weights_back: WholeOrNull
    perplexity: Perplexities
    dense_perplexity: Perplexities
    matrix: Annotated[tuple[MatrixRow, ...], Field(strict=False), Must("a list of versions with their perplexities")]
    perplexity_before: NumberOrNull
    backward_transfer: NumberOrNull
    seconds: Seconds
    layers: Annotated[tuple[Layer, ...], Field(strict=False), Must("a list of layers")]
    code: Code
    libraries: Annotated[Mapping[str, Text], Must("a JSON object of versions by library")]
    hardware: JsonObject
    seeds: JsonObject
    created: UtcTime
    # Left out where there are none: such a version has the record that it always had.
    tasks: TasksOfDomains = Field(default_factory=dict, exclude_if=lambda tasks: not tasks)
    files: Annotated[
        Mapping[str, Sha256],
        Must("a JSON object of SHA-256 by path"),
        AfterValidator(_all_inside),
        Field(json_schema_extra={"propertyNames": {"pattern": _INSIDE}}),
    ]

    @property
    def digest(self) -> str:
        """SHA-256 (hexadecimal) of the record's canonical JSON: the same before writing and after reading."""
        return fingerprint(self.as_json())

    @property
    def mean_perplexity(self) -> float | None:
        """Geometric mean over its domains; None where it has none."""
        return geometric_mean(list(self.perplexity.values()))

    @property
    def mean_dense_perplexity(self) -> float | None:
        """Of the dense base, likewise."""
        return geometric_mean(list(self.dense_perplexity.values()))

    @property
    def withdraws(self) -> Withdrawn | None:
        """What this version withdrew; None where it withdrew nothing."""
        return self.withdrawn[-1] if self.parent is not None and self.step is None and self.withdrawn else None

    def domains_at(self, version: int) -> tuple[Domain, ...]:
        """The domains of this record of model version `version`, ready for the record of a child.

        `contribution_version` None ("this version") becomes `version`.
        """
        return tuple(
            domain.model_copy(update={"contribution_version": domain.made_in(version)}) for domain in self.domains
        )

    def _problem(self) -> str | None:
        names = [domain.name for domain in self.domains]
        if names != sorted(set(names)):
            return f"domains must be sorted by name, each name once, not {shown(names)}"
        if self.step is not None and self.step not in self.domains:
            return f"step must be one of the domains, and {self.step.name!r} is not"
        if set(self.perplexity) != set(self.dense_perplexity):
            return "perplexity and dense_perplexity must name the same domains"
        if strange := sorted(set(self.tasks) - set(names)):
            return f"tasks must be of its domains, and {shown(strange[0])} is not one"
        if self.parent is None:
            rooted = self.key is None and self.step is None
            return None if rooted else "key and step must be null where parent is (the root of a lineage)"
        if self.key is None:
            return "key must be there where parent is"
        gone = self.withdraws
        if self.step is None and (gone is None or gone.name in names):
            return "without a step, the last of withdrawn must be a domain that is not in domains"
        return None


def parse_record(value: object, where: str) -> Record:
    """The record that was read as plain JSON.

    Raises:
        LineageError: it is of another schema, or a field is missing or wrong; names `where` and the field.
    """
    if isinstance(value, dict) and value.get("schema") != SCHEMA:
        raise LineageError(
            f"{where}: schema is {value.get('schema')!r}, this copal reads {SCHEMA!r}; use the copal that wrote it"
        )
    return parse(Record, value, where)


def read_record(path: Path) -> Record:
    """Read a record and check it.

    Raises:
        LineageError: no file, no JSON, another schema, or a field that is missing or wrong.
    """
    return parse_record(read_json(path, LineageError), str(path))


def write_record(path: Path, record: Record) -> None:
    """Write a record as pretty JSON with sorted keys, whole or not at all."""
    write_atomic(path, json_text(record.as_json()))


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a part of a record by their dotted names."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
