"""Which version serves: `challenger` is the newest that passed its gates, `champion` the one that somebody promoted.

An alias moves under a claim on the aliases of its lineage, in three writes: the log entry that says so, the alias, and
a note in the ledger that the move of that entry is settled. The log comes first, for only so can a move that a process
was killed in be told from one that somebody made by hand in MLflow's UI:

    not settled, alias as the entry found it                  killed: `settle` makes the move
    not settled, alias as the entry wants it                  killed: `settle` settles it
    anything else that is not as the last entry wants it      by hand: refused, unless it is forced with a reason
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from copal.errors import CopalError
from flows.gates.show import show_gates
from flows.ledger import LogMovedError
from flows.lineage import entries as log
from flows.lineage.entries import (
    CHALLENGER,
    CHAMPION,
    Entry,
    GatesDetails,
    GatesEntry,
    MoveDetails,
    MoveEntry,
    alias_moves,
    champions,
    logged_alias,
    who_text,
)
from flows.project import Project, append_log, hold_aliases, read_log
from flows.registry.errors import AliasMovedError

if TYPE_CHECKING:
    from flows.ledger import Claim
    from flows.registry.registry import Registry
    from flows.registry.versions import ModelVersion

__all__ = [
    "PromotionError",
    "decided",
    "gates_entry",
    "judged",
    "make_champion",
    "move_champion",
    "named",
    "restore_champion",
    "settle",
    "unsettled",
    "unshown",
]

_T = TypeVar("_T")


class PromotionError(CopalError):
    """A version may not become the champion, or there is none to go back to; nothing changed."""


def make_champion(
    project: Project,
    number: int,
    *,
    why: str | None = None,
    force: bool = False,
    tell: Callable[[str], None] | None = None,
) -> Entry | None:
    """Make version `number` the champion.

    Args:
        why: for the log.
        force: even if its gates failed or never ran, or the alias was moved by hand; wants a reason.
        tell: called with a line where another process moves an alias.

    Returns:
        The log entry; None where the version is the champion already.

    Raises:
        PromotionError: its gates failed or never ran, or `force` has no reason.
        AliasMovedError: the alias was moved by hand, or another promotion came first.
        RegistryError: there is no such version, or the registry fails.
        LineageError: the log was altered.
    """
    _check_reason(force, why)
    registry = project.registry
    seen = len(alias_moves(read_log(project), CHAMPION))
    with hold_aliases(project, f"promote version {number}", tell) as claim:

        def move(entries: Sequence[Entry]) -> Entry | None:
            refusal = _refusal(registry.version(number), entries)
            if refusal and not force:
                raise PromotionError(
                    f"version {number} of {registry.model_name} {refusal}; "
                    f"to promote it all the same: copal promote {number} --force --why TEXT"
                )
            _check_first(registry, entries, seen)
            return move_champion(project, claim, entries, "promotion", number, why=why, force=force)

        return decided(project, claim, move)


def restore_champion(
    project: Project,
    *,
    why: str | None = None,
    force: bool = False,
    tell: Callable[[str], None] | None = None,
) -> Entry:
    """Make the champion before this one the champion again; once more: the one before that.

    Args:
        why, force, tell: see `promote`.

    Returns:
        The log entry.

    Raises:
        PromotionError: there was no champion before, or `force` has no reason.
        AliasMovedError, RegistryError, LineageError: see `promote`.
    """
    _check_reason(force, why)
    registry = project.registry
    seen = len(alias_moves(read_log(project), CHAMPION))
    with hold_aliases(project, "roll back", tell) as claim:

        def move(entries: Sequence[Entry]) -> Entry:
            there = {version.number for version in registry.versions()}
            now = registry.alias(CHAMPION)  # by force also from where somebody set it by hand, to that of the log
            stack = champions(entries)
            earlier = [number for number in (stack[:-1] if stack[-1:] == [now] else stack) if number in there]
            if not earlier:
                raise PromotionError(f"{registry.model_name} had no champion before this one: nothing to go back to")
            _check_first(registry, entries, seen)
            made = move_champion(project, claim, entries, "rollback", earlier[-1], why=why, force=force)
            if made is None:
                raise PromotionError(
                    f"somebody set {CHAMPION} of {registry.model_name} to version {earlier[-1]} already"
                )
            return made

        return decided(project, claim, move)


def decided(project: Project, claim: Claim, move: Callable[[Sequence[Entry]], _T]) -> _T:
    """What `move` gives, which gets the log, looks at the aliases, decides, and appends what it decided to the log.

    Where others append in between, it looks again: so nobody logs a move from where the alias is no more, however late
    a paused process wakes.

    Raises:
        ClaimLostError: the aliases were taken over. What the log has by then, whoever holds them does.
    """
    while True:
        claim.check()
        entries = read_log(project)
        settle(project, entries)
        with suppress(LogMovedError):
            return move(entries)
        project.registry.refresh_aliases()


def settle(project: Project, entries: Sequence[Entry]) -> None:
    """Do what the log names and a killed process did not: move aliases, show gates that ran again. Only for who holds
    the aliases.

    Args:
        entries: the log.

    Raises:
        RegistryError: the registry fails.
    """
    registry = project.registry
    for alias, entry, actual in unsettled(project, entries):
        if actual in (entry.from_version, entry.to_version):
            registry.move_alias(alias, entry.to_version, expected=actual)
            project.ledger.settle(alias, entry.number)
    for version, entry in unshown(project, entries):
        show_gates(project, version, entry)


def unsettled(project: Project, entries: Sequence[Entry]) -> list[tuple[str, GatesEntry | MoveEntry, int | None]]:
    """(alias, the log entry that moves it, the version that it names now) of moves that were not made to their end."""
    return [
        (alias, moves[-1], project.registry.alias(alias))
        for alias in (CHALLENGER, CHAMPION)
        if (moves := alias_moves(entries, alias)) and project.ledger.settled(alias) < moves[-1].number
    ]


def unshown(project: Project, entries: Sequence[Entry]) -> list[tuple[ModelVersion, GatesEntry]]:
    """(version, its newest gate results) of concluded versions that show older ones: their gates ran again."""
    newest = [
        (version, gates_entry(version, entries)) for version in project.registry.versions() if version.gates is not None
    ]
    return [(version, entry) for version, entry in newest if entry is not None and version.log_entry < entry.number]


def judged(project: Project, version: ModelVersion, details: GatesDetails, entries: Sequence[Entry]) -> Entry:
    """Log the gate results of a version, and with them where `challenger` goes; within `decided`.

    The newest version that passed is the challenger. One that passed and was judged again and failed is it no more.
    """
    registry = project.registry
    to = now = registry.alias(CHALLENGER)
    if details.passed and (now is None or now < version.number):
        to = version.number
    elif not details.passed and now == version.number:
        others = (other for other in registry.versions() if other.number != version.number)
        passed = [other.number for other in others if _has_passed(other, entries)]
        to = max(passed, default=None)
    moves = to != now
    return append_log(
        project,
        "gates",
        version=version.number,
        from_version=now if moves else None,
        to_version=to if moves else None,
        details=details,
        after=len(entries),
    )


def move_champion(
    project: Project, claim: Claim, entries: Sequence[Entry], kind: str, number: int, *, why: str | None, force: bool
) -> Entry | None:
    """Move `champion` to version `number`, with a log entry of `kind`; None where it is there already; within
    `decided`.

    Args:
        entries: the log, by which it was decided.

    Raises:
        AliasMovedError: it was moved by hand since the last entry, and `force` is not set.
        LogMovedError: there are other entries by now; nothing changed.
        ClaimLostError: the aliases were taken over after the entry was logged.
    """
    registry = project.registry
    logged, actual = logged_alias(entries, CHAMPION), registry.alias(CHAMPION)
    if actual != logged and not force:
        raise AliasMovedError(
            f"{CHAMPION} of {registry.model_name} was moved by hand: it names {named(actual)}, the log says "
            f"{named(logged)}; set it back in MLflow, or go on from there with --force --why TEXT"
        )
    if actual == number == logged:
        return None
    passed = gates_entry(registry.version(number), entries)
    details = MoveDetails(
        alias=CHAMPION, forced=force, gates=None if passed is None else passed.number, logged_before=logged
    )
    entry = append_log(
        project,
        kind,
        version=number,
        from_version=actual,
        to_version=number,
        why=why,
        details=details,
        after=len(entries),
    )
    claim.check()
    registry.move_alias(CHAMPION, number, expected=actual)
    project.ledger.settle(CHAMPION, entry.number)
    return entry


def gates_entry(version: ModelVersion, entries: Sequence[Entry]) -> GatesEntry | None:
    """The log entry with the results of the version's gates, of this record of it; None where there is none."""
    return log.gates_entry(entries, version.number, version.digest)


def _has_passed(version: ModelVersion, entries: Sequence[Entry]) -> bool:
    entry = gates_entry(version, entries)
    return entry is not None and entry.details.passed


def _check_first(registry: Registry, entries: Sequence[Entry], seen: int) -> None:
    """What was looked at before the claim is still so."""
    moves = alias_moves(entries, CHAMPION)
    if len(moves) != seen:
        raise AliasMovedError(
            f"{CHAMPION} of {registry.model_name} was moved to {named(moves[-1].to_version)} in the meantime by "
            f"{who_text(moves[-1].who)}; look at it, then try again"
        )


def _refusal(version: ModelVersion, entries: Sequence[Entry]) -> str | None:
    """Why a version may not be promoted; None where it may. The dense base has no gates."""
    if version.parent is None:
        return None
    entry = gates_entry(version, entries)
    if entry is None:
        return "has not gone through its gates"
    bad = [gate.name for gate in entry.details.failed]
    return f"failed its gates ({', '.join(bad)})" if not entry.details.passed else None


def _check_reason(force: bool, why: str | None) -> None:
    if force and not (why and why.strip()):
        raise PromotionError("--force wants a reason for the log: add --why TEXT")


def named(number: int | None) -> str:
    """A version, for people."""
    return "no version" if number is None else f"version {number}"
