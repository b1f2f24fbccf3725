"""The log of a lineage: what happened to its versions after they were made, as a hash chain. Pure: knows no registry.

Gate results, promotions, rollbacks, withdrawals and purges are entries. Each holds the digest of the one before it:
see `flows.lineage.chain`. An entry is never changed.
"""

from __future__ import annotations

import getpass
import socket
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from copal.config import fingerprint
from flows.lineage.fields import (
    Frozen,
    LineageError,
    Must,
    NumberOrNull,
    Sha256,
    Sha256OrNull,
    Text,
    TextOrNull,
    UtcTime,
    Whole,
    WholeOrNull,
    parse,
    shown,
)

__all__ = [
    "CHALLENGER",
    "CHAMPION",
    "KINDS",
    "SCHEMA",
    "Details",
    "Entry",
    "GateResult",
    "GatesDetails",
    "GatesEntry",
    "MoveDetails",
    "MoveEntry",
    "PurgeDetails",
    "PurgeEntry",
    "Who",
    "WithdrawalDetails",
    "WithdrawalEntry",
    "alias_moves",
    "champions",
    "digest_of",
    "gates_entry",
    "logged_alias",
    "next_entry",
    "parse_entry",
    "who_text",
    "writer",
]

SCHEMA: Final = "copal.log/1"
KINDS = ("gates", "promotion", "rollback", "withdrawal", "purge")
CHAMPION, CHALLENGER = "champion", "challenger"  # the aliases that the log tells of

_NULL = Must("null")
_VERSIONS = Must("a list of version numbers")


class Who(Frozen):
    """Who wrote an entry.

    Attributes:
        role: that the database knew the writer by; None where it knew none. User and host are only what the process
            said of itself.
    """

    role: TextOrNull
    user: Text
    host: Text


class GateResult(Frozen):
    """What a gate says.

    Attributes:
        value, limit: the figure that decided, and what it may be at most (`sparsity`: must be); None where there is
            none, or it is not finite.
        detail: one line for people.
    """

    name: Text
    passed: Annotated[bool, Must("true or false")]
    value: NumberOrNull
    limit: NumberOrNull
    detail: Annotated[str, Must("text")]


class GatesDetails(Frozen):
    """The results of all gates.

    Attributes:
        record: digest of the record that was judged.
        promote: `auto` where what passes is to become the champion, see `flows.settings.GateSettings`.
    """

    record: Sha256
    passed: Annotated[bool, Must("true or false")]
    promote: Text
    gates: Annotated[tuple[GateResult, ...], Field(strict=False), Must("a list of gate results")]

    @property
    def failed(self) -> tuple[GateResult, ...]:
        """Those that did not pass."""
        return tuple(gate for gate in self.gates if not gate.passed)


class MoveDetails(Frozen):
    """How an alias was moved by people, or after gates that passed.

    Attributes:
        forced: although gates failed or never ran, or the alias had been moved by hand.
        gates: number of the entry with the gate results of the version that it moved to; None where there was none.
        logged_before: the version that it should have named by the log.
    """

    alias: Text
    forced: Annotated[bool, Must("true or false")]
    gates: WholeOrNull
    logged_before: WholeOrNull


class WithdrawalDetails(Frozen):
    """The dataset version that was withdrawn."""

    domain: Text
    dvc_md5: Text


class PurgeDetails(Frozen):
    """What was deleted of a domain.

    Attributes:
        deleted: versions whose contribution is gone.
        traces: versions whose weights were computed with the domain's data.
    """

    domain: Text
    dvc_md5: Text
    deleted: Annotated[tuple[Whole, ...], Field(strict=False), _VERSIONS]
    traces: Annotated[tuple[Whole, ...], Field(strict=False), _VERSIONS]


class _Entry(Frozen):
    """What all entries have.

    Attributes:
        number: from 1.
        previous: digest of the entry before it.
        why: in the words of who did it.
        version: that it is about.
        from_version, to_version: of an alias that moved.
    """

    schema_: Annotated[Literal["copal.log/1"], Must(f"{SCHEMA!r}")] = Field(default=SCHEMA, alias="schema")
    number: Annotated[int, Field(ge=1), Must("a whole number of at least 1")]
    previous: Sha256OrNull
    when: UtcTime
    who: Who
    why: Annotated[str | None, Must("text or null")]
    version: WholeOrNull
    from_version: WholeOrNull = Field(alias="from")
    to_version: WholeOrNull = Field(alias="to")

    @property
    def digest(self) -> str:
        """SHA-256 (hexadecimal) of the entry's canonical JSON."""
        return fingerprint(self.as_json())


class GatesEntry(_Entry):
    """The gates of a version ran; `challenger` moved where from and to differ."""

    kind: Literal["gates"] = Field(description="'gates'")
    version: Whole
    details: GatesDetails


class MoveEntry(_Entry):
    """`champion` moved."""

    kind: Literal["promotion", "rollback"] = Field(description="'promotion' or 'rollback'")
    version: Whole
    to_version: Whole = Field(alias="to")
    details: MoveDetails


class WithdrawalEntry(_Entry):
    """A version was made without a domain."""

    kind: Literal["withdrawal"] = Field(description="'withdrawal'")
    version: Whole
    from_version: Annotated[None, _NULL] = Field(alias="from")
    to_version: Annotated[None, _NULL] = Field(alias="to")
    details: WithdrawalDetails


class PurgeEntry(_Entry):
    """What was kept of a withdrawn domain was deleted."""

    kind: Literal["purge"] = Field(description="'purge'")
    version: Annotated[None, _NULL]
    from_version: Annotated[None, _NULL] = Field(alias="from")
    to_version: Annotated[None, _NULL] = Field(alias="to")
    details: PurgeDetails


Entry = Annotated[GatesEntry | MoveEntry | WithdrawalEntry | PurgeEntry, Field(discriminator="kind")]
Details = GatesDetails | MoveDetails | WithdrawalDetails | PurgeDetails


def parse_entry(value: object, where: str) -> Entry:
    """The entry that was read as plain JSON.

    Raises:
        LineageError: names `where` and the field, and says what the field must be.
    """
    if not isinstance(value, dict):
        raise LineageError(f"{where}: must be a JSON object with the fields of a log entry, not {shown(value)}")
    for field in ("schema", "kind"):
        if field not in value:
            raise LineageError(f"{where}: {field} is missing")
    match value["kind"]:
        case "gates":
            return parse(GatesEntry, value, where)
        case "withdrawal":
            return parse(WithdrawalEntry, value, where)
        case "purge":
            return parse(PurgeEntry, value, where)
        case "promotion" | "rollback":
            return parse(MoveEntry, value, where)
        case other:
            raise LineageError(
                f"{where}: kind must be one of {', '.join(KINDS[:-1])} and {KINDS[-1]}, not {shown(other)}"
            )


def next_entry(
    entries: Sequence[Any],
    *,
    kind: str,
    who: Who,
    version: int | None = None,
    from_version: int | None = None,
    to_version: int | None = None,
    why: str | None = None,
    details: Details,
) -> Entry:
    """The entry that follows `entries`, made now.

    Args:
        entries: of the log, or as they are stored.
        kind: one of `KINDS`.
        who: see `writer`.
        version: that it is about; `from_version`, `to_version`: of an alias that moved.
        why: in the words of who did it.
        details: of the kind.

    Raises:
        LineageError: a value does not fit the kind.
    """
    number = len(entries) + 1
    entry = {
        "schema": SCHEMA,
        "number": number,
        "previous": digest_of(entries[-1]) if entries else None,
        "kind": kind,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "who": who.as_json(),
        "why": why,
        "version": version,
        "from": from_version,
        "to": to_version,
        "details": details.as_json(),
    }
    return parse_entry(entry, f"log entry {number}")


def writer(role: str | None) -> Who:
    """Who runs this process.

    Args:
        role: that the database knows the writer by; None where it knows none.
    """
    return Who(role=role, user=_user(), host=socket.gethostname())


def who_text(who: Who) -> str:
    """The writer of an entry, for people."""
    person = f"{who.user}@{who.host}"
    return person if who.role is None else f"role {who.role} ({person})"


def digest_of(value: Any) -> str | None:
    """Of an entry, or as it is stored; None of one that is missing, and of NaN."""
    try:
        return None if value is None else fingerprint(value.as_json() if isinstance(value, Frozen) else value)
    except ValueError:
        return None


def gates_entry(entries: Sequence[Entry], version: int, digest: str) -> GatesEntry | None:
    """The newest entry with gate results of the version with this number and record; None where there is none."""
    return next((entry for entry in reversed(_gates(entries)) if _is_of(entry, version, digest)), None)


def alias_moves(entries: Sequence[Entry], alias: str) -> Sequence[GatesEntry | MoveEntry]:
    """The entries of the log that move an alias; none where the log tells nothing of it."""
    if alias == CHALLENGER:
        return [entry for entry in _gates(entries) if entry.from_version != entry.to_version]
    return _champion_moves(entries) if alias == CHAMPION else []


def logged_alias(entries: Sequence[Entry], alias: str) -> int | None:
    """The version that an alias should name, by the log."""
    moves = alias_moves(entries, alias)
    return moves[-1].to_version if moves else None


def champions(entries: Sequence[Entry]) -> list[int]:
    """The champion by the log and before it those that a rollback goes back to, the nearest last."""
    stack: list[int] = []
    for entry in _champion_moves(entries):
        before, to = entry.from_version, entry.to_version
        if entry.kind == "rollback":
            while stack and stack[-1] != to:
                stack.pop()
        elif before is not None and stack[-1:] != [before]:  # set by hand, and gone on from by force
            stack.append(before)
        if stack[-1:] != [to]:
            stack.append(to)
    return stack


def _gates(entries: Sequence[Entry]) -> list[GatesEntry]:
    return [entry for entry in entries if isinstance(entry, GatesEntry)]


def _champion_moves(entries: Sequence[Entry]) -> list[MoveEntry]:
    return [entry for entry in entries if isinstance(entry, MoveEntry)]


def _is_of(entry: GatesEntry, version: int, digest: str) -> bool:
    return entry.version == version and entry.details.record == digest


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container with a user that has no name
        return "unknown"
