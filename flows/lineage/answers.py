"""What an auditor asks of a lineage, answered from its history alone; every answer is plain JSON. Pure.

`used`: which versions hold a dataset. `data_in`: which data is in the champion, now or on a date. `diff`: what changed
between two versions. `worse`: which domain got worse, when, and by which step. `whose`: whether a folder is a version.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, date, datetime, time
from typing import Any

from flows.lineage.entries import CHALLENGER, CHAMPION, alias_moves
from flows.lineage.files import (
    CONTRIBUTION_FOLDER,
    HASHED_FOLDERS,
    PARTS,
    SUM_FOLDER,
    FolderFiles,
    file_differences,
    part_of,
)
from flows.lineage.history import (
    History,
    HistoryError,
    Version,
    evaluation_digests,
    find_version,
    since_newest,
    step_texts,
)
from flows.lineage.record import Domain, flatten

__all__ = [
    "data_in",
    "diff",
    "used",
    "whose",
    "worse",
]


_ALIASES = (CHAMPION, CHALLENGER)  # known even before a version has one


_CARD, _BASE_CARD = "README.md", "BASE_README.md"  # an export adds the first, and calls the base's own the second


_MD5_PREFIX = 8  # hexadecimal digits that an abbreviated md5 must have at least


def used(history: History, dataset: str) -> dict[str, Any]:
    """Which versions hold a dataset: the name of a domain, or the md5 of its data, with or without `.dir`.

    Returns:
        {question, dataset, versions, spells}; a spell is {domain, dvc_md5, versions, came_in, left_in, how} with `how`
        one of "replaced" and "withdrawn", None (as `left_in`) where the newest version still holds it.
    """
    names = {domain.name for version in history.versions for domain in version.record.domains}
    spells = [spell for spell in _spells(history) if _means(dataset, spell, names)]
    return {
        "question": "used",
        "dataset": dataset,
        "versions": sorted({number for spell in spells for number in spell["versions"]}),
        "spells": spells,
    }


def data_in(history: History, wanted: str = "champion", on: str | None = None) -> dict[str, Any]:
    """Which data is in the version that `wanted` (an alias or a number) names now, or named on a date.

    Args:
        on: a day or a time in ISO 8601, UTC where it names no zone. Of a day, what stood at its end; what moved during
            it is told as well.

    Returns:
        {question, wanted, on, version, since, moves, domains, withdrawn}. `version` None: the alias named none.
        `since`: when the alias got there, where the log tells. `moves`: {when, from, to} during the day.

    Raises:
        HistoryError: there is no such version or alias; `on` is no date, or `wanted` is none that a date can be asked
            of.
    """
    begin, end = (None, None) if on is None else _moment(on)
    moves: list[dict[str, Any]] = [
        {"when": entry.when, "from": entry.from_version, "to": entry.to_version}
        for entry in alias_moves(history.log, wanted)
    ]
    since = None
    if end is None:
        try:
            version: Version | None = find_version(history, wanted)
        except HistoryError:
            if wanted not in _ALIASES or not history.versions:
                raise
            version = None
        if version is not None and moves and moves[-1]["to"] == version.number:
            since = moves[-1]["when"]
    else:
        version, since = _then(history, wanted, moves, end)
    return {
        "question": "data",
        "wanted": wanted,
        "on": None if end is None else end.isoformat(timespec="seconds"),
        "version": None if version is None else version.number,
        "since": since,
        "moves": []
        if begin is None or end is None
        else [move for move in moves if begin <= _time(move["when"]) <= end],
        "domains": [] if version is None else [domain.as_json() for domain in version.record.domains],
        "withdrawn": [] if version is None else [gone.as_json() for gone in version.record.withdrawn],
    }


def diff(history: History, first: str, second: str) -> dict[str, Any]:
    """What changed from one version to another; each a number or an alias.

    Returns:
        {question, a, b, domains: {added, removed, replaced, reweighted}, changes: {section: [{name, a, b}]},
        perplexity: [{domain, a, b, change, comparable}], files: {same, changed, added, removed}, parts: [{part, files,
        why}], changed_files}. The sections are settings, code, libraries, hardware, seeds, sparsity; `change` is a
        share, None where it does not compare. `parts`: how many files of each part changed, and why such files do.

    Raises:
        HistoryError: there is no such version.
    """
    a, b = find_version(history, first), find_version(history, second)
    before, after = a.record, b.record
    old = {domain.name: domain for domain in before.domains}
    new = {domain.name: domain for domain in after.domains}
    both = sorted(old.keys() & new.keys())
    digests = evaluation_digests(a), evaluation_digests(b)
    perplexity = []
    for name in sorted(old.keys() | new.keys()):
        one, other = before.perplexity.get(name), after.perplexity.get(name)
        same = name in both and digests[0][name] == digests[1][name]
        change = other / one - 1 if same and one and other is not None else None
        perplexity.append({"domain": name, "a": one, "b": other, "change": change, "comparable": same})
    was, now = before.as_json(), after.as_json()
    sections = ("settings", "code", "libraries", "hardware", "seeds", "sparsity")
    files = before.files, after.files
    shared = files[0].keys() & files[1].keys()
    changed = sorted(name for name in shared if files[0][name] != files[1][name])
    return {
        "question": "diff",
        "a": a.number,
        "b": b.number,
        "domains": {
            "added": [_named(new[name]) for name in sorted(new.keys() - old.keys())],
            "removed": [_named(old[name]) for name in sorted(old.keys() - new.keys())],
            "replaced": [
                {"domain": name, "a": old[name].dvc_md5, "b": new[name].dvc_md5}
                for name in both
                if old[name].dvc_md5 != new[name].dvc_md5
            ],
            "reweighted": [
                {"domain": name, "a": old[name].weight, "b": new[name].weight}
                for name in both
                if old[name].weight != new[name].weight
            ],
        },
        "changes": {section: _changed(was[section], now[section]) for section in sections},
        "perplexity": perplexity,
        "files": {
            "same": sum(files[0][name] == files[1][name] for name in shared),
            "changed": len(changed),
            "added": len(files[1].keys() - shared),
            "removed": len(files[0].keys() - shared),
        },
        "parts": [
            {"part": part, "files": sum(part_of(name) == part for name in changed), "why": why}
            for part, why in PARTS.items()
            if any(part_of(name) == part for name in changed)
        ],
        "changed_files": changed,
    }


def worse(history: History, domain: str | None = None) -> dict[str, Any]:
    """Which domains got worse since they were the newest, when, and by which step; the worst first.

    Only figures on the same evaluation tokens are compared. A domain whose data was replaced, or that was withdrawn and
    came again, counts once for each time.

    Args:
        domain: only this one.

    Returns:
        {question, domain, domains: [{domain, newest_in, perplexity_when_newest, version, perplexity, change, worst,
        steps, not_comparable}]}. `version`: the newest that compares (`newest_in` itself where there is none).
        `change`: a share; above 0 is worse. `steps`: {version, step, perplexity, change} each against the one before
        it; `worst`: that of them with the greatest change above 0, or None. `not_comparable`: later versions, measured
        on other tokens.

    Raises:
        HistoryError: no version ever held `domain`.
    """
    steps_of = step_texts(history)
    found = []
    for name, first, after in since_newest(history):
        if domain not in (None, name):
            continue
        later = [measure for measure in after if measure.digest == first.digest]
        steps: list[dict[str, Any]] = [
            {
                "version": measure.version,
                "step": steps_of[measure.version],
                "perplexity": measure.perplexity,
                "change": measure.perplexity / before.perplexity - 1,
            }
            for before, measure in zip([first, *later], later, strict=False)
        ]
        last = later[-1] if later else first
        rises = [step for step in steps if step["change"] > 0]
        found.append(
            {
                "domain": name,
                "newest_in": first.version,
                "perplexity_when_newest": first.perplexity,
                "version": last.version,
                "perplexity": last.perplexity,
                "change": last.perplexity / first.perplexity - 1,
                "worst": max(rises, key=lambda step: step["change"], default=None),
                "steps": steps,
                "not_comparable": [m.version for m in after if m.digest != first.digest],
            }
        )
    if domain is not None and not found:
        raise HistoryError(f"no version of {history.model} holds the domain {domain!r}")
    return {"question": "worse", "domain": domain, "domains": sorted(found, key=lambda one: -one["change"])}


def whose(history: History, folder: FolderFiles) -> dict[str, Any]:
    """Whether a folder's files are those of a version: its own folder (model/, state/) or an exported one.

    A model card that the export added does not count, nor, in a version's own folder, what lies beside model/ and
    state/, nor a running sum that was dropped.

    Args:
        folder: all its files; of an exported one the version's own in the place of its shards.

    Returns:
        {question, versions, form, closest, differences}. `versions`: all whose files these are, byte by byte. Where
        there are none, `closest` is the version that shares the most bytes, None where nothing is shared, and
        `differences` are `missing: F`, `changed: F`, `extra: F`. `form`: "exported" or "version".

    Raises:
        HistoryError: the folder has no files.
    """
    if not folder.digests:
        raise HistoryError("the folder has no files; name a version's folder or an exported model")
    exact: list[tuple[int, str]] = []
    best: tuple[tuple[int, int, int], int, str, list[str]] | None = None
    for version in history.versions:
        for form, wanted, there in _forms(version, folder.digests):
            same = [name for name in there if wanted.get(name) == there[name]]
            differences = [
                *(_said(line, folder.said) for line in file_differences(wanted, there, _dropped(version))),
                *folder.faults,
            ]
            if not differences and same:
                exact.append((version.number, form))
            score = (sum(folder.sizes[name] for name in same), len(same), version.number)
            if same and (best is None or score > best[0]):
                best = score, version.number, form, differences
    closest = best if best is not None and not exact else None
    return {
        "question": "whose",
        "versions": [number for number, _ in exact],
        "form": exact[0][1] if exact else closest[2] if closest else None,
        "closest": closest[1] if closest else None,
        "differences": closest[3] if closest else [],
    }


def _spells(history: History) -> list[dict[str, Any]]:
    """Every time that a dataset was in the lineage, in the order they came."""
    spells: list[dict[str, Any]] = []
    running: dict[str, dict[str, Any]] = {}
    for version in history.versions:
        held = {domain.name: domain.dvc_md5 for domain in version.record.domains}
        for name, spell in list(running.items()):
            if held.get(name) != spell["dvc_md5"]:
                spell["left_in"] = version.number
                spell["how"] = "replaced" if name in held else "withdrawn"
                del running[name]
        for name, md5 in held.items():
            if name not in running:
                running[name] = {
                    "domain": name,
                    "dvc_md5": md5,
                    "versions": [],
                    "came_in": version.number,
                    "left_in": None,
                    "how": None,
                }
                spells.append(running[name])
            running[name]["versions"].append(version.number)
    return spells


def _means(dataset: str, spell: Mapping[str, Any], names: set[str]) -> bool:
    if dataset in names:
        return bool(spell["domain"] == dataset)
    md5 = dataset.lower().removesuffix(".dir")
    return len(md5) >= _MD5_PREFIX and spell["dvc_md5"].removesuffix(".dir").startswith(md5)


def _then(
    history: History, wanted: str, moves: list[dict[str, Any]], end: datetime
) -> tuple[Version | None, str | None]:
    """The version that an alias named at a time, and since when."""
    if wanted == "latest":  # MLflow's own: no log tells of it, the times of the versions do
        made = [version for version in history.versions if _time(version.record.created) <= end]
        return (made[-1], made[-1].record.created) if made else (None, None)
    if wanted not in _ALIASES and not moves:
        raise HistoryError(f"the log of {history.model} tells no moves of {wanted!r}: ask a date of an alias in it")
    before = [move for move in moves if _time(move["when"]) <= end]
    if not before or before[-1]["to"] is None:
        return None, before[-1]["when"] if before else None
    return find_version(history, str(before[-1]["to"])), before[-1]["when"]


def _moment(text: str) -> tuple[datetime | None, datetime]:
    """(begin, end) of a day, (None, end) of a time."""
    try:
        if len(text) <= len("2026-01-02"):
            day = date.fromisoformat(text)
            return datetime.combine(day, time.min, UTC), datetime.combine(day, time.max, UTC)
        return None, _time(text)
    except ValueError as error:
        raise HistoryError(f"{text!r} is no date; write 2026-01-31 or 2026-01-31T12:00:00Z (UTC)") from error


def _time(text: str) -> datetime:
    found = datetime.fromisoformat(text)
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)


def _named(domain: Domain) -> dict[str, Any]:
    return {"domain": domain.name, "dvc_md5": domain.dvc_md5}


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, Any]]:
    old, new = dict(flatten(before)), dict(flatten(after))
    return [
        {"name": name, "a": old.get(name), "b": new.get(name)}
        for name in sorted(old.keys() | new.keys())
        if (name in old) != (name in new) or old.get(name) != new.get(name)
    ]


def _forms(version: Version, digests: Mapping[str, str]) -> Iterator[tuple[str, dict[str, str], dict[str, str]]]:
    """(form, the files that it should have, those of the folder that count)."""
    wanted = version.record.files
    yield (
        "version",
        dict(wanted),
        {n: d for n, d in digests.items() if n in wanted or n.partition("/")[0] in HASHED_FOLDERS},
    )
    model = {n.removeprefix("model/"): d for n, d in wanted.items() if n.startswith("model/") and n != f"model/{_CARD}"}
    yield "exported", model, {name: digest for name, digest in digests.items() if name not in (_CARD, _BASE_CARD)}


def _said(difference: str, said: Mapping[str, str]) -> str:
    kind, _, name = difference.partition(": ")
    return f"{kind}: {said.get(name, name)}"


def _dropped(version: Version) -> tuple[str, ...]:
    """The folders of a version that were dropped: that a file of them is missing is no difference."""
    tags = {"copal.sum_dropped": SUM_FOLDER, "copal.contribution_dropped": CONTRIBUTION_FOLDER}
    return tuple(folder for tag, folder in tags.items() if tag in version.tags)
