"""The history of a lineage as one plain value: its versions with their records and aliases, and its log.

`read_history` asks the registry once; the chain in the terminal, the page, OpenLineage events and the answers to an
auditor are all made from what it gives, and read nothing more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from copal.errors import CopalError
from flows.lineage.entries import CHAMPION, gates_entry, who_text

if TYPE_CHECKING:
    pass

__all__ = [
    "History",
    "HistoryError",
    "Measure",
    "evaluation_digests",
    "find_version",
    "gates_of",
    "geometric_mean",
    "log_text",
    "measures",
    "printable",
    "since_newest",
    "step_texts",
    "summary",
    "up_to",
]


# {model, versions: oldest first, each {version, parent, aliases, tags, digest, record, signature (SHA-256 or None)},
#  log: as `Registry.log` gives it}
History = Mapping[str, Any]


Measure = dict[str, Any]  # one perplexity, see `measures`


class HistoryError(CopalError):
    """The history does not know what it was asked for."""


def up_to(history: History, wanted: str) -> dict[str, Any]:
    """The history with no version after `wanted` (a number or an alias); the log stays whole.

    Raises:
        HistoryError: there is no such version.
    """
    number = find_version(history, wanted)["version"]
    return {**history, "versions": [version for version in history["versions"] if version["version"] <= number]}


def find_version(history: History, wanted: str) -> dict[str, Any]:
    """The version with this number or alias.

    Raises:
        HistoryError: there is none.
    """
    for version in history["versions"]:
        if wanted == str(version["version"]) or wanted in version["aliases"]:
            return dict(version)
    known = [str(version["version"]) for version in history["versions"]]
    known += sorted(alias for version in history["versions"] for alias in version["aliases"])
    raise HistoryError(
        f"{history['model']} has no version or alias {wanted!r}; there are: {', '.join(known) or 'no versions yet'}"
    )


def gates_of(history: History, number: int, digest: str) -> Mapping[str, Any] | None:
    """The newest gate results, {record, passed, gates}, of the version with this number and record; None of none."""
    entry = gates_entry(history["log"], number, digest)
    return None if entry is None else dict(entry["details"])


def step_texts(history: History) -> dict[int, str]:
    """What made each version, in a few words: the domain that it adapted to, or what was withdrawn."""
    texts = {}
    held: set[str] = set()
    for version in history["versions"]:
        record = version["record"]
        before, held = held, {domain["name"] for domain in record["domains"]}
        if record["parent"] is None:
            text = "dense base"
        elif record["step"] is None:
            text = f"without {', '.join(sorted(before - held))}" if before - held else "withdrawal"
        else:
            text = record["step"]["name"]
        texts[version["version"]] = text
    return texts


def geometric_mean(values: Sequence[float]) -> float | None:
    """Of positive numbers; None of none."""
    return math.exp(math.fsum(map(math.log, values)) / len(values)) if values else None


def evaluation_digests(version: Mapping[str, Any]) -> dict[str, str]:
    """For each domain of a version, the SHA-256 of the tokens that its perplexity was measured on."""
    return {domain["name"]: domain["evaluation_digest"] for domain in version["record"]["domains"]}


def measures(history: History) -> dict[str, list[Measure]]:
    """For each domain, in the order they came, its perplexity in every version that holds it.

    Each is {version, perplexity, dense, digest, newest_in, comparable}: `newest_in` is the version that the data in it
    made, `comparable` tells whether it was measured on the same tokens as in the newest version that holds the domain.
    """
    found: dict[str, list[Measure]] = {}
    for version in history["versions"]:
        record = version["record"]
        step = (record["step"] or {}).get("name")
        for domain in sorted(record["domains"], key=lambda domain: (domain["name"] != step, domain["name"])):
            name, made = domain["name"], domain["contribution_version"]
            if name not in record["perplexity"]:
                continue
            found.setdefault(name, []).append(
                {
                    "version": version["version"],
                    "perplexity": record["perplexity"][name],
                    "dense": record["dense_perplexity"][name],
                    "digest": domain["evaluation_digest"],
                    "newest_in": version["version"] if made is None else made,
                }
            )
    for row in found.values():
        for measure in row:
            measure["comparable"] = measure["digest"] == row[-1]["digest"]
    return found


def since_newest(history: History) -> Iterator[tuple[str, Measure, list[Measure]]]:
    """(domain, its measure in the version that its data made, those after it), spell by spell.

    A domain whose data was replaced, or that was withdrawn and came again, has a spell for each time. Measures with
    another digest than the first say nothing about forgetting.
    """
    for name, row in measures(history).items():
        for made in dict.fromkeys(measure["newest_in"] for measure in row):
            spell = [measure for measure in row if measure["newest_in"] == made]
            first = spell[0]
            if first["version"] == made:
                yield name, first, spell[1:]


def summary(history: History) -> list[dict[str, Any]]:
    """A line a version for people and programs, oldest first.

    Each is {version, parent, step, domain, dvc_md5, git_rev, repository, created, sparsity, weights_back,
    backward_transfer, perplexity (geometric mean over its domains), dense_perplexity (the same of the dense base),
    seconds, domains, aliases, gates ({passed, failed: names} or None), digest, chained, signature}. `chained`: whether
    the record names the digest of the record before it; None at the root.
    """
    lines, steps = [], step_texts(history)
    digests = {version["version"]: version["digest"] for version in history["versions"]}
    for version in history["versions"]:
        record, gates = version["record"], gates_of(history, version["version"], version["digest"])
        step, parent = record["step"] or {}, record["parent"]
        lines.append(
            {
                "version": version["version"],
                "parent": version["parent"],
                "step": steps[version["version"]],
                "domain": step.get("name"),
                "dvc_md5": step.get("dvc_md5"),
                "git_rev": step.get("git_rev"),
                "repository": step.get("repository"),
                "created": record["created"],
                "sparsity": record["sparsity"]["counted"],
                "weights_back": record["weights_back"],
                "backward_transfer": record["backward_transfer"],
                "perplexity": geometric_mean(list(record["perplexity"].values())),
                "dense_perplexity": geometric_mean(list(record["dense_perplexity"].values())),
                "seconds": sum(record["seconds"].values()),
                "domains": [domain["name"] for domain in record["domains"]],
                "aliases": list(version["aliases"]),
                "gates": None
                if gates is None
                else {
                    "passed": gates["passed"],
                    "failed": [gate["name"] for gate in gates["gates"] if not gate["passed"]],
                },
                "digest": version["digest"],
                "chained": None if parent is None else digests.get(parent["version"]) == parent["digest"],
                "signature": version.get("signature"),
            }
        )
    return lines


def printable(text: object) -> str:
    """`text` without what a terminal would obey: the data of others may hold escape sequences."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in str(text))


def log_text(entry: Mapping[str, Any]) -> str:
    """One line on an entry of the log."""
    details = entry["details"]
    what = {
        "promotion": f"promoted to {CHAMPION}",
        "rollback": f"{CHAMPION} rolled back to it",
        "withdrawal": f"withdrew {details.get('domain', 'a domain')}",
        "purge": f"purged {details.get('domain', 'a domain')}",
    }.get(entry["kind"], entry["kind"])
    before = f" from version {entry['from']}" if entry["from"] is not None else ""
    why = f": {entry['why']}" if entry["why"] else ""
    return f"{what}{before}, {entry['when']}, by {who_text(entry['who'])}{why}"
