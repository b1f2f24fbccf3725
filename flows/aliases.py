"""Which version serves: `challenger` is the newest that passed its gates, `champion` the one that somebody promoted.

An alias moves under the claim of its lineage, in three writes: the log entry that says so, the alias, and a tag with
the number of that entry. The log comes first, for only so can a move that a process was killed in be told from one that
somebody made by hand in MLflow's UI:

    tag older than the entry, alias as the entry found it     killed: `settle` makes the move
    tag older than the entry, alias as the entry wants it     killed: `settle` sets the tag
    anything else that is not as the last entry wants it      by hand: refused, unless it is forced with a reason
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from copal.errors import CopalError
from flows.claims import claimed
from flows.registry import AliasMovedError

if TYPE_CHECKING:
    from flows.claims import Claim
    from flows.registry import ModelVersion, Registry
    from flows.settings import Settings

__all__ = [
    "CHALLENGER",
    "CHAMPION",
    "PromotionError",
    "champions",
    "gates_entry",
    "move_champion",
    "promote",
    "rollback",
    "settle",
]

CHAMPION, CHALLENGER = "champion", "challenger"
_MOVES = ("promotion", "rollback")

Entry = Mapping[str, Any]


class PromotionError(CopalError):
    """A version may not become the champion, or there is none to go back to; nothing changed."""


def promote(
    registry: Registry,
    settings: Settings,
    number: int,
    *,
    why: str | None = None,
    force: bool = False,
    tell: Callable[[str], None] | None = None,
) -> dict[str, Any] | None:
    """Make version `number` the champion.

    Args:
        why: for the log.
        force: even if its gates failed or never ran, or the alias was moved by hand; wants a reason.
        tell: called with a line where another process has the lineage.

    Returns:
        The log entry; None where the version is the champion already.

    Raises:
        PromotionError: its gates failed or never ran, or `force` has no reason.
        AliasMovedError: the alias was moved by hand, or another promotion came first.
        RegistryError: there is no such version, or the registry fails.
        LineageError: the log was altered.
    """
    _check_reason(force, why)
    seen = _moves(registry.log())
    with claimed(registry, f"promote version {number}", lease=settings.run.lease, tell=tell) as claim:
        settle(registry)
        refusal = _refusal(registry.version(number), registry.log())
        if refusal and not force:
            raise PromotionError(
                f"version {number} of {registry.model_name} {refusal}; "
                f"to promote it all the same: copal promote {number} --force --why TEXT"
            )
        _check_first(registry, seen)
        return move_champion(registry, claim, "promotion", number, why=why, force=force)


def rollback(
    registry: Registry,
    settings: Settings,
    *,
    why: str | None = None,
    force: bool = False,
    tell: Callable[[str], None] | None = None,
) -> dict[str, Any]:
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
    seen = _moves(registry.log())
    with claimed(registry, "roll back", lease=settings.run.lease, tell=tell) as claim:
        settle(registry)
        there = {version.number for version in registry.versions()}
        now = registry.alias(CHAMPION)  # by force also from where somebody set it by hand, to the champion by the log
        stack = champions(registry.log())
        earlier = [number for number in (stack[:-1] if stack[-1:] == [now] else stack) if number in there]
        if not earlier:
            raise PromotionError(f"{registry.model_name} had no champion before this one: nothing to go back to")
        _check_first(registry, seen)
        made = move_champion(registry, claim, "rollback", earlier[-1], why=why, force=force)
        if made is None:
            raise PromotionError(f"somebody set {CHAMPION} of {registry.model_name} to version {earlier[-1]} already")
        return made


def settle(registry: Registry) -> None:
    """Make the alias moves that the log names and a killed process did not make. Only for who holds the lineage.

    Raises:
        RegistryError: the registry fails.
        LineageError: the log was altered.
    """
    entries = registry.log()
    challenges = [entry for entry in entries if entry["kind"] == "gates" and entry["to"] is not None]
    for alias, moves in ((CHALLENGER, challenges), (CHAMPION, _champion_moves(entries))):
        if not moves or registry.moved_by(alias) >= moves[-1]["number"]:
            continue
        last, actual = moves[-1], registry.alias(alias)
        if actual in (last["from"], last["to"]):
            registry.move_alias(alias, last["to"], expected=actual, entry=last["number"])


def move_champion(
    registry: Registry, claim: Claim, kind: str, number: int, *, why: str | None, force: bool
) -> dict[str, Any] | None:
    """Move `champion` to version `number`, with a log entry of `kind`; None where it is there already.

    Raises:
        AliasMovedError: it was moved by hand since the last entry, and `force` is not set.
        ClaimLostError: the lineage was taken over; nothing changed.
    """
    entries = registry.log()
    logged, actual = _logged_champion(entries), registry.alias(CHAMPION)
    if actual != logged and not force:
        raise AliasMovedError(
            f"{CHAMPION} of {registry.model_name} was moved by hand: it names {_named(actual)}, the log says "
            f"{_named(logged)}; set it back in MLflow, or go on from there with --force --why TEXT"
        )
    if actual == number == logged:
        return None
    passed = gates_entry(registry.version(number), entries)
    details = {
        "alias": CHAMPION,
        "forced": force,
        "gates": None if passed is None else passed["number"],
        "logged_before": logged,
    }
    claim.check()
    entry = registry.append_log(kind, version=number, from_version=actual, to_version=number, why=why, details=details)
    claim.check()
    registry.move_alias(CHAMPION, number, expected=actual, entry=entry["number"])
    return entry


def gates_entry(version: ModelVersion, entries: Sequence[Entry]) -> Entry | None:
    """The log entry with the results of the version's gates, of this record of it; None where there is none."""
    digest = version.tags["copal.lineage_digest"]
    found = [entry for entry in entries if entry["kind"] == "gates" and entry["version"] == version.number]
    return next((entry for entry in reversed(found) if entry["details"].get("record") == digest), None)


def champions(entries: Sequence[Entry]) -> list[int]:
    """The champion by the log and before it those that a rollback goes back to, the nearest last."""
    stack: list[int] = []
    for entry in _champion_moves(entries):
        before, to = entry["from"], entry["to"]
        if entry["kind"] == "rollback":
            while stack and stack[-1] != to:
                stack.pop()
        elif before is not None and stack[-1:] != [before]:  # set by hand, and gone on from by force
            stack.append(before)
        if stack[-1:] != [to]:
            stack.append(to)
    return stack


def _champion_moves(entries: Sequence[Entry]) -> list[Entry]:
    return [entry for entry in entries if entry["kind"] in _MOVES]


def _moves(entries: Sequence[Entry]) -> int:
    return len(_champion_moves(entries))


def _logged_champion(entries: Sequence[Entry]) -> int | None:
    moves = _champion_moves(entries)
    return moves[-1]["to"] if moves else None


def _check_first(registry: Registry, seen: int) -> None:
    """What was looked at before the claim is still so."""
    moves = _champion_moves(registry.log())
    if len(moves) != seen:
        raise AliasMovedError(
            f"{CHAMPION} of {registry.model_name} was moved to {_named(moves[-1]['to'])} by {moves[-1]['who']} "
            "in the meantime; look at it, then try again"
        )


def _refusal(version: ModelVersion, entries: Sequence[Entry]) -> str | None:
    """Why a version may not be promoted; None where it may. The dense base has no gates."""
    if version.parent is None:
        return None
    entry = gates_entry(version, entries)
    if entry is None:
        return "has not gone through its gates"
    bad = [gate["name"] for gate in entry["details"]["gates"] if not gate["passed"]]
    return f"failed its gates ({', '.join(bad)})" if not entry["details"]["passed"] else None


def _check_reason(force: bool, why: str | None) -> None:
    if force and not (why and why.strip()):
        raise PromotionError("--force wants a reason for the log: add --why TEXT")


def _named(number: int | None) -> str:
    return "no version" if number is None else f"version {number}"
