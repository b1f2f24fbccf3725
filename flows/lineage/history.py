"""The history of a lineage as one plain value: its versions with their records and aliases, and its log.

`flows.registry.history.read_history` asks the registry once; the chain in the terminal, the page, OpenLineage events
and the answers to an auditor are all made from what it gives, and read nothing more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from copal.errors import CopalError
from flows.lineage.entries import CHAMPION, Entry, GatesDetails, gates_entry, who_text
from flows.lineage.record import Domain, Record

__all__ = [
    "History",
    "HistoryError",
    "Line",
    "Measure",
    "Version",
    "evaluation_digests",
    "find_version",
    "gates_of",
    "log_text",
    "measures",
    "since_newest",
    "step_texts",
    "summary",
    "up_to",
]


class HistoryError(CopalError):
    """The history does not know what it was asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Version:
    """A version of the lineage.

    Attributes:
        parent: number of the version that it was made of; None of the root.
        digest: of its record. `signature`: SHA-256 of the file; None where it is not signed.
        tags: of the registry.
    """

    number: int
    parent: int | None
    aliases: tuple[str, ...]
    tags: Mapping[str, str]
    digest: str
    record: Record
    signature: str | None

    def as_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "version": self.number,
            "parent": self.parent,
            "aliases": list(self.aliases),
            "tags": dict(self.tags),
            "digest": self.digest,
            "record": self.record.as_json(),
            "signature": self.signature,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class History:
    """The versions of a lineage, oldest first, and its log."""

    model: str
    versions: tuple[Version, ...]
    log: tuple[Entry, ...]

    def as_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "model": self.model,
            "versions": [version.as_json() for version in self.versions],
            "log": [entry.as_json() for entry in self.log],
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """The perplexity of a version on one domain.

    Attributes:
        version: the number of the version.
        dense: perplexity of the dense base on the same tokens; `digest`: of these tokens.
        newest_in: number of the version that the domain's data made.
        comparable: whether it was measured on the same tokens as in the newest version that holds the domain.
    """

    version: int
    perplexity: float
    dense: float
    digest: str
    newest_in: int
    comparable: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """What the chain and the page tell of a version.

    Attributes:
        step: what made it, in a few words.
        domain: that the step brought; None of the root and of a withdrawal.
        perplexity, dense_perplexity: geometric means over its domains.
        gates: the newest results; None where the gates never ran.
        chained: whether the record names the digest of the record before it; None at the root.
    """

    version: int
    parent: int | None
    step: str
    domain: Domain | None
    created: str
    sparsity: float
    weights_back: int | None
    perplexity: float | None
    dense_perplexity: float | None
    aliases: tuple[str, ...]
    gates: GatesDetails | None
    digest: str
    chained: bool | None
    signature: str | None

    @property
    def ratio(self) -> float | None:
        """Of the perplexity to the dense base's."""
        return self.perplexity / self.dense_perplexity if self.perplexity and self.dense_perplexity else None


def up_to(history: History, wanted: str) -> History:
    """The history with no version after `wanted` (a number or an alias); the log stays whole.

    Raises:
        HistoryError: there is no such version.
    """
    last = find_version(history, wanted).number
    return replace(history, versions=tuple(version for version in history.versions if version.number <= last))


def find_version(history: History, wanted: str) -> Version:
    """The version with this number or alias.

    Raises:
        HistoryError: there is none.
    """
    for version in history.versions:
        if wanted == str(version.number) or wanted in version.aliases:
            return version
    known = [str(version.number) for version in history.versions]
    known += sorted(alias for version in history.versions for alias in version.aliases)
    raise HistoryError(
        f"{history.model} has no version or alias {wanted!r}; there are: {', '.join(known) or 'no versions yet'}"
    )


def gates_of(history: History, version: Version) -> GatesDetails | None:
    """The newest gate results of a version, of this record of it; None where there are none."""
    entry = gates_entry(history.log, version.number, version.digest)
    return None if entry is None else entry.details


def step_texts(history: History) -> dict[int, str]:
    """What made each version, in a few words: the domain that it adapted to, or what was withdrawn."""
    texts = {}
    held: set[str] = set()
    for version in history.versions:
        record = version.record
        before, held = held, {domain.name for domain in record.domains}
        if record.parent is None:
            text = "dense base"
        elif record.step is None:
            text = f"without {', '.join(sorted(before - held))}" if before - held else "withdrawal"
        else:
            text = record.step.name
        texts[version.number] = text
    return texts


def evaluation_digests(version: Version) -> dict[str, str]:
    """For each domain of a version, the SHA-256 of the tokens that its perplexity was measured on."""
    return {domain.name: domain.evaluation_digest for domain in version.record.domains}


def measures(history: History) -> dict[str, list[Measure]]:
    """For each domain, in the order they came, its perplexity in every version that holds it."""
    newest = {
        domain.name: domain.evaluation_digest
        for version in history.versions
        for domain in version.record.domains
        if domain.name in version.record.perplexity
    }
    found: dict[str, list[Measure]] = {}
    for version in history.versions:
        record = version.record
        step = None if record.step is None else record.step.name
        for domain in sorted(record.domains, key=lambda domain: (domain.name != step, domain.name)):
            if domain.name not in record.perplexity:
                continue
            measure = Measure(
                version=version.number,
                perplexity=record.perplexity[domain.name],
                dense=record.dense_perplexity[domain.name],
                digest=domain.evaluation_digest,
                newest_in=domain.made_in(version.number),
                comparable=domain.evaluation_digest == newest[domain.name],
            )
            found.setdefault(domain.name, []).append(measure)
    return found


def since_newest(history: History) -> Iterator[tuple[str, Measure, list[Measure]]]:
    """(domain, its measure in the version that its data made, those after it), spell by spell.

    A domain whose data was replaced, or that was withdrawn and came again, has a spell for each time. Measures with
    another digest than the first say nothing about forgetting.
    """
    for name, row in measures(history).items():
        for made in dict.fromkeys(measure.newest_in for measure in row):
            first, *after = [measure for measure in row if measure.newest_in == made]
            if first.version == made:
                yield name, first, after


def summary(history: History) -> list[Line]:
    """A line a version, oldest first."""
    steps = step_texts(history)
    digests = {version.number: version.digest for version in history.versions}
    lines = []
    for version in history.versions:
        record = version.record
        parent = record.parent
        lines.append(
            Line(
                version=version.number,
                parent=version.parent,
                step=steps[version.number],
                domain=record.step,
                created=record.created,
                sparsity=record.sparsity.counted,
                weights_back=record.weights_back,
                perplexity=record.mean_perplexity,
                dense_perplexity=record.mean_dense_perplexity,
                aliases=version.aliases,
                gates=gates_of(history, version),
                digest=version.digest,
                chained=None if parent is None else digests.get(parent.version) == parent.digest,
                signature=version.signature,
            )
        )
    return lines


def log_text(entry: Entry) -> str:
    """One line on an entry of the log."""
    match entry.kind:
        case "withdrawal":
            what = f"withdrew {entry.details.domain}"
        case "purge":
            what = f"purged {entry.details.domain}"
        case "promotion":
            what = f"promoted to {CHAMPION}"
        case "rollback":
            what = f"{CHAMPION} rolled back to it"
        case "gates":
            what = "gates"
    before = f" from version {entry.from_version}" if entry.from_version is not None else ""
    why = f": {entry.why}" if entry.why else ""
    return f"{what}{before}, {entry.when}, by {who_text(entry.who)}{why}"
