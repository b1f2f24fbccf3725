"""Which dataset versions were refused, and why: a row a lineage and domain, so that nobody tries the same in vain.

This only saves tries. So the table, which is younger than the others, is made when there is something to put into it:
ledgers of before are without, and copals of before do not mind it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import delete, inspect, select

from flows.ledger.store import Store, clock, inserting
from flows.ledger.tables import refusals

__all__ = ["Refusal", "forget_refusal", "note_refusal", "read_refusals"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """Why the data of a domain was refused.

    Attributes:
        dvc_md5: of the dataset version.
        settings: fingerprint of what refused it, with the data.
        reason: one line.
        since: when.
    """

    dvc_md5: str
    settings: str
    reason: str
    since: datetime


def read_refusals(store: Store, lineage: str) -> Mapping[str, Refusal]:
    """What was refused last in a lineage, by domain; see `flows.ledger.Ledger.refusals`."""
    with store.reading() as connection:
        if connection is None or not inspect(connection).has_table(refusals.name):
            return {}
        found = connection.execute(select(refusals).where(refusals.c.lineage == lineage))
        return {
            row.domain: Refusal(
                dvc_md5=row.dvc_md5,
                settings=row.settings,
                reason=row.reason,
                since=datetime.fromtimestamp(row.since, UTC),
            )
            for row in found
        }


def note_refusal(store: Store, lineage: str, domain: str, *, dvc_md5: str, settings: str, reason: str) -> None:
    """Write down a refusal; the one before of the same domain goes. See `flows.ledger.Ledger.refuse`."""
    values = {"dvc_md5": dvc_md5, "settings": settings, "reason": reason}
    with store.writing() as connection:
        store.make(connection, refusals)
        insert = inserting(connection, refusals).values(
            lineage=lineage, domain=domain, since=clock(connection), **values
        )
        key = [refusals.c.lineage, refusals.c.domain]
        connection.execute(
            insert.on_conflict_do_update(index_elements=key, set_=values | {"since": insert.excluded.since})
        )


def forget_refusal(store: Store, lineage: str, domain: str) -> None:
    """The data of a domain is not refused any more; see `flows.ledger.Ledger.forget_refusal`."""
    if domain not in read_refusals(store, lineage):
        return
    with store.writing() as connection:
        connection.execute(delete(refusals).where(refusals.c.lineage == lineage, refusals.c.domain == domain))
