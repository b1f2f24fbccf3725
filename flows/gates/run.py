"""What follows a registration: the gates of the new version, and the aliases that they move.

The log entry with the results is what counts. It comes first, tags and aliases after it and the tag `copal.gates` last:
a version without that tag is not concluded, and whoever takes the lineage next does what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from copal.errors import CopalError, StateError
from flows.data.recorded import dataset_of
from flows.gates.champion import decided, gates_entry, judged, move_champion, settle
from flows.gates.judge import GateResult, judge
from flows.gates.show import show_gates
from flows.lineage.entries import CHALLENGER, CHAMPION, Entry, GatesDetails, alias_moves
from flows.lineage.files import verify_files
from flows.lineage.record import Record
from flows.project import Project, data_of, hold_aliases, read_log
from flows.registry.errors import AliasMovedError

if TYPE_CHECKING:
    from flows.ledger import Claim
    from flows.registry.registry import Registry
    from flows.registry.versions import ModelVersion

__all__ = ["run_gates"]

PROMPT_TOKENS, TOKENS = 32, 20


@dataclass(frozen=True, kw_only=True, slots=True)
class _Evidence:
    """What gates judge by; see `flows.gates.judge`."""

    record: Record
    others: Mapping[int, Record]
    rounding: float
    generation: Mapping[str, str | None]
    problems: tuple[str, ...]


def run_gates(
    project: Project,
    version: ModelVersion,
    claim: Claim | None,
    tell: Callable[[str], None] | None = None,
    *,
    again: bool = False,
) -> tuple[GateResult, ...]:
    """Run the gates of a version and move the aliases that they move; what was done before is not done again.

    A gate that fails is a result and no error: the version stays the head of the lineage.

    Args:
        claim: on the lineage, of who has just registered the version; None: nobody is hurt if two do this at once.
        tell: called with a line where `champion` was moved by hand, which `promote: auto` leaves alone.
        again: run them with the settings of today even if they ran before.

    Raises:
        ClaimLostError: the lineage was taken over.
        RegistryError: the registry fails.
        LineageError: the log was altered.
    """
    evidence = None
    if again or gates_entry(version, read_log(project)) is None:
        evidence = _gather(project, version, claim)
    with hold_aliases(project, f"gates of version {version.number}") as aliases:
        _check(claim)  # others may have held the aliases for long
        if evidence is not None:  # judged only now, for the champion may have moved
            decided(project, aliases, partial(_judge, project, version, evidence))
        entries = read_log(project)
        settle(project, entries)
        entry = gates_entry(version, entries)
        assert entry is not None
        if entry.details.passed and entry.details.promote == "auto":
            decided(project, aliases, partial(_promote, project, version, aliases, tell))
        show_gates(project, version, entry, partial(_check, claim))
    return entry.details.gates


def _check(claim: Claim | None) -> None:
    if claim is not None:
        claim.check()


def _promote(
    project: Project,
    version: ModelVersion,
    claim: Claim,
    tell: Callable[[str], None] | None,
    entries: Sequence[Entry],
) -> None:
    """What passed becomes the champion, unless somebody has decided otherwise since, or a newer one passed."""
    registry = project.registry
    champion = registry.alias(CHAMPION)
    if registry.alias(CHALLENGER) != version.number or (champion is not None and champion > version.number):
        return
    first = next(
        each  # of this version: one of the same number may have been deleted with its lineage
        for each in entries
        if each.kind == "gates" and each.version == version.number and each.details.record == version.digest
    )
    if any(move.number > first.number for move in alias_moves(entries, CHAMPION)):
        return
    try:
        move_champion(project, claim, entries, "promotion", version.number, why="all gates passed", force=False)
    except AliasMovedError as error:
        if tell:
            tell(str(error))


def _judge(
    project: Project,
    version: ModelVersion,
    evidence: _Evidence,
    entries: Sequence[Entry],
) -> Entry:
    """The log entry with the results of the gates, against the champion that serves now."""
    results = judge(
        evidence.record,
        evidence.others,
        project.registry.alias(CHAMPION),
        project.settings.gates,
        rounding=evidence.rounding,
        generation=evidence.generation,
        problems=evidence.problems,
    )
    details = GatesDetails(
        record=version.digest,
        passed=all(result.passed for result in results),
        promote=project.settings.gates.promote,
        gates=results,
    )
    return judged(project, version, details, entries)


def _gather(project: Project, version: ModelVersion, claim: Claim | None) -> _Evidence:
    registry = project.registry
    record = registry.record(version)
    others, problems = _chain(registry, version, record)
    folder = registry.folder(version)
    problems += verify_files(record, folder, **version.dropped)
    _check(claim)
    written = _write(project, version, record, folder / "model") if project.settings.gates.generation else {}
    return _Evidence(
        record=record, others=others, rounding=_rounding(folder), generation=written, problems=tuple(problems)
    )


def _chain(registry: Registry, version: ModelVersion, record: Record) -> tuple[dict[int, Record], list[str]]:
    """The records of the versions before this one, and what is wrong with the chain of their digests."""
    records: dict[int, Record] = {}
    problems: list[str] = []
    for other in registry.versions():
        if other.number != version.number:
            try:
                records[other.number] = registry.record(other)
            except CopalError as error:
                problems.append(str(error))
    child = record
    while child.parent is not None:
        parent = child.parent
        if parent.version not in records:
            with suppress(CopalError):  # deleted in MLflow
                records[parent.version] = registry.record(registry.kept(parent.version))
        if parent.version not in records:
            problems.append(f"the record of version {parent.version} is not there")
            break
        child = records[parent.version]
        if child.digest != parent.digest:
            problems.append(f"version {parent.version} is not the one that its child was made of")
    return records, problems


def _write(project: Project, version: ModelVersion, record: Record, model: Path) -> dict[str, str | None]:
    """What is wrong with the text that the model writes after the beginning of an evaluation window, by domain."""
    from copal.calibration import domain_windows
    from copal.generate import continue_greedily
    from copal.processes import device
    from copal.streaming import compute_dtype
    from copal.tokenizer import load_tokenizer

    settings = project.settings
    tokenizer = load_tokenizer(model)
    found: dict[str, str | None] = {}
    prompts = {}
    for domain in record.domains_at(version.number):
        try:
            data = data_of(project, dataset_of(domain))
            window = domain_windows(
                data, tokenizer, settings.calibration, left_out=domain.left_out.as_hashes()
            ).evaluation[0]
        except CopalError as error:
            found[domain.name] = f"no prompt: {error}"
        else:
            prompts[domain.name] = window[:PROMPT_TOKENS]
    if not prompts:
        return found
    try:
        dtype = compute_dtype(settings.model.dtype, device())
        continued = continue_greedily(model, prompts, tokens=TOKENS, dtype=dtype)
    except CopalError as error:
        return found | dict.fromkeys(prompts, str(error))
    for name, text in continued.items():
        if not text.finite:
            found[name] = "the model's output is not finite"
        elif text.degenerate or not tokenizer.decode(text.tokens, skip_special_tokens=True).strip():
            found[name] = f"the text is empty, or one token over and over: {tokenizer.decode(text.tokens)!r}"
        else:
            found[name] = None
    return found


def _rounding(folder: Path) -> float:
    """How far a row's share of zeros may be from the wanted one, for there are no half weights."""
    from copal.step import read_report

    try:
        return max(0.5 / layer.features for layer in read_report(folder).layers)
    except StateError:  # the report is no part of the record: without it nothing is rounded
        return 0.0
