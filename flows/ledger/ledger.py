"""The claims and the log of one lineage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from sqlalchemy import select

from flows.ledger.claims import Claim, holding
from flows.ledger.entries import add, read
from flows.ledger.errors import LogMovedError
from flows.ledger.refusals import Refusal, forget_refusal, note_refusal, read_refusals
from flows.ledger.rows import Holder, Place, look
from flows.ledger.store import Access, Store, inserting
from flows.ledger.tables import settled
from flows.lineage.chain import chain_problems, entries_of
from flows.lineage.entries import Details, Entry, next_entry, writer
from flows.lineage.fields import LineageError

__all__ = ["Ledger"]


class Ledger:
    """The claims and the log of one lineage. Nothing is opened before it is asked for something.

    Each call is one short transaction (of `hold`, a few). Reading never makes a database.

    Attributes:
        uri: `sqlite:////PATH` or `postgresql://...`; may hold a password.
        lineage: the name of the registered model.
    """

    def __init__(self, uri: str, lineage: str) -> None:
        self.uri, self.lineage = uri, lineage
        self._store = Store(uri)

    def hold(
        self, on: str, what: str, *, lease: float, tell: Callable[[str], None] | None = None
    ) -> AbstractContextManager[Claim]:
        """Hold the lineage or its aliases; waits as long as somebody else does.

        Where the claim was lost, another error inside the `with` becomes a `ClaimLostError`: the loss led to it.

        Args:
            on: `LINEAGE` or `ALIASES`.
            what: the work in a few words, for people who want to know who holds the lineage.
            lease: seconds after which a holder that gives no sign of life may be taken over.
            tell: called with a line when this has to wait.

        Raises:
            LedgerError: the ledger cannot be written.
        """
        return holding(Place(store=self._store, lineage=self.lineage, kind=on), what, lease, tell)

    def holder(self, on: str) -> Holder | None:
        """Who holds the lineage (`LINEAGE`) or its aliases (`ALIASES`), or held them last; None where nobody ever did.

        Raises:
            LedgerError: the ledger cannot be read.
        """
        return look(Place(store=self._store, lineage=self.lineage, kind=on))

    def access(self) -> Access | None:
        """See `flows.ledger.store.Store.access`."""
        return self._store.access()

    def log(self) -> list[Entry]:
        """What happened to the versions after they were made, oldest first; structure and chain are checked.

        Raises:
            LineageError: it was altered.
            LedgerError: it cannot be read.
        """
        return self._checked(self.log_as_stored())

    def log_as_stored(self) -> list[Any]:
        """The log as it is stored; nothing is checked.

        None stands for an entry that is missing. One that is not canonical JSON, or has not the digest that is stored
        beside it, comes as text.

        Raises:
            LedgerError: it cannot be read.
        """
        with self._store.reading() as connection:
            return [] if connection is None else read(connection, self.lineage)

    def append(
        self,
        kind: str,
        *,
        version: int | None = None,
        from_version: int | None = None,
        to_version: int | None = None,
        why: str | None = None,
        details: Details,
        after: int | None = None,
    ) -> Entry:
        """Append an entry to the log, see `flows.lineage.entries.next_entry`; anybody who may write may, at any time.

        Args:
            after: how many entries the log had when it was decided what this one says; None: what it says depends on
                no other entry.

        Returns:
            The entry.

        Raises:
            LogMovedError: there are more than `after`; nothing was appended.
            LineageError: the log was altered.
            LedgerError: it cannot be written.
        """

        def follow(stored: Sequence[Any], role: str | None) -> Entry:
            entries = self._checked(stored)
            if after not in (None, len(entries)):
                raise LogMovedError(f"the log of {self.lineage} has {len(entries)} entries, and not {after}")
            return next_entry(
                entries,
                kind=kind,
                who=writer(role),
                version=version,
                from_version=from_version,
                to_version=to_version,
                why=why,
                details=details,
            )

        return add(self._store, self.lineage, follow)

    def settled(self, alias: str) -> int:
        """The number of the newest log entry whose move of the alias was made in the registry; 0 for none.

        Raises:
            LedgerError: it cannot be read.
        """
        query = select(settled.c.entry).where(settled.c.lineage == self.lineage, settled.c.alias == alias)
        with self._store.reading() as connection:
            return 0 if connection is None else connection.scalar(query) or 0

    def settle(self, alias: str, entry: int) -> None:
        """Note that the alias was moved in the registry as log entry `entry` says; an older entry changes nothing.

        Raises:
            LedgerError: it cannot be written.
        """
        row = {"lineage": self.lineage, "alias": alias, "entry": entry}
        with self._store.writing() as connection:
            insert = inserting(connection, settled).values(row)
            newer = insert.excluded.entry > settled.c.entry
            key = [settled.c.lineage, settled.c.alias]
            connection.execute(insert.on_conflict_do_update(index_elements=key, set_={"entry": entry}, where=newer))

    def refusals(self) -> Mapping[str, Refusal]:
        """Whose data was refused last, and why, by domain; also of data and settings that are not wanted any more.

        Raises:
            LedgerError: they cannot be read.
        """
        return read_refusals(self._store, self.lineage)

    def refuse(self, domain: str, *, dvc_md5: str, settings: str, reason: str) -> None:
        """Write down why the data of a domain is refused; what was written of its other data goes.

        Raises:
            LedgerError: it cannot be written.
        """
        note_refusal(self._store, self.lineage, domain, dvc_md5=dvc_md5, settings=settings, reason=reason)

    def forget_refusal(self, domain: str) -> None:
        """The data of a domain is not refused any more.

        Raises:
            LedgerError: it cannot be written.
        """
        forget_refusal(self._store, self.lineage, domain)

    def _checked(self, stored: Sequence[Any]) -> list[Entry]:
        problems = chain_problems(stored)
        if problems:
            raise LineageError(f"the log of {self.lineage}: {problems[0]}")
        return entries_of(stored)
