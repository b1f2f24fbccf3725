"""The rows of claims: each change is one compare-and-set on the fencing token, in a transaction of its own."""

from __future__ import annotations

import socket
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import and_, or_, select, update

from flows.ledger.store import Store, clock, inserting
from flows.ledger.tables import claims
from flows.machine import find_process

__all__ = ["Holder", "Place", "change", "look", "take"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Names the row of a claim: by lineage and kind."""

    store: Store
    lineage: str
    kind: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """Who holds a claim, or held it last; see `flows.ledger.tables`.

    Attributes:
        over: whether the claim was freed or is past its expiry.
        left: seconds to its expiry, by the database's clock; below 0 where it is past that.
    """

    token: int
    over: bool
    left: float
    sealed: str
    what: str
    host: str
    machine: str
    pid: int
    started: float

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} ({self.what})"

    def is_dead(self) -> bool:
        """Whether it was a process of this machine that is no more."""
        return self.machine == _machine() and find_process(self.pid, self.started) is None


def look(place: Place) -> Holder | None:
    """Who holds the claim, or held it last; None where nobody ever did.

    Raises:
        LedgerError: the database cannot be read.
    """
    with place.store.reading() as connection:
        if connection is None:
            return None
        now = clock(connection)
        computed = or_(~claims.c.held, claims.c.expires <= now).label("over"), (claims.c.expires - now).label("left")
        shown = [claims.c[name] for name in Holder.__slots__ if name not in ("over", "left")]
        row = connection.execute(select(*computed, *shown).where(_of(place))).mappings().one_or_none()
        return None if row is None else Holder(**row)


def take(place: Place, seen: Holder | None, what: str, lease: float, *, dead: bool = False) -> bool:
    """Take the claim from the holder that was seen, if it still may be taken; False where somebody was faster.

    Args:
        dead: the holder's process was found dead: it need not be past its expiry.

    Raises:
        LedgerError: the database cannot be written.
    """
    import psutil

    here = psutil.Process()
    holder = {
        "what": what,
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": here.pid,
        "started": here.create_time(),
    }
    with place.store.writing() as connection:
        now = clock(connection)
        values = {"held": True, "expires": now + lease, **holder}
        if seen is None:
            row = {"lineage": place.lineage, "kind": place.kind, "token": 1, "sealed": "", **values}
            made = inserting(connection, claims).values(row).on_conflict_do_nothing()
            return bool(connection.execute(made).rowcount == 1)
        statement = update(claims).where(_of(place), claims.c.token == seen.token)
        if not dead:  # it may have been renewed since it was seen
            statement = statement.where(or_(~claims.c.held, claims.c.expires <= now))
        return connection.execute(statement.values(token=seen.token + 1, **values)).rowcount == 1


def change(place: Place, token: int, values: dict[str, Any], *, lease: float | None = None) -> bool:
    """Change the claim of the holder with this token; False where it is that holder's no more.

    Args:
        lease: move the expiry on, to that many seconds from now; of a claim past its expiry nothing is changed then.

    Raises:
        LedgerError: the database cannot be written.
    """
    with place.store.writing() as connection:
        statement = update(claims).where(_of(place), claims.c.token == token, claims.c.held)
        if lease is not None:
            now = clock(connection)
            statement = statement.where(claims.c.expires > now)
            values = values | {"expires": now + lease}
        return connection.execute(statement.values(values)).rowcount == 1


def _of(place: Place) -> Any:
    return and_(claims.c.lineage == place.lineage, claims.c.kind == place.kind)


def _machine() -> str:
    """Where a process number means one process: this machine, and in it the container.

    The address of a network interface is added to the machine's name, for names are not unique; the number of the
    process namespace, for containers may share both.
    """
    namespace = ""
    with suppress(OSError):  # not Linux
        namespace = str(Path("/proc/self/ns/pid").readlink())
    return f"{socket.gethostname()} {uuid.getnode():012x} {namespace}".strip()
