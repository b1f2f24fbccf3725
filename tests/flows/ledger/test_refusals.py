"""What a ledger keeps of data that was refused, on real databases."""

from __future__ import annotations

import time

from flows.ledger import Ledger
from support.ledgers import PURGED, run_sql

A, B = "a" * 32 + ".dir", "b" * 32 + ".dir"


def test_the_last_refusal_of_each_domain_is_kept(ledger: Ledger, uri: str) -> None:
    assert ledger.refusals() == {}
    ledger.forget_refusal("code")
    before = time.time()
    ledger.refuse("code", dvc_md5=A, settings="one", reason="too small")
    ledger.refuse("legal", dvc_md5=A, settings="one", reason="no text")
    ledger.refuse("code", dvc_md5=B, settings="two", reason="no \u2028 text")
    found = Ledger(uri, "tiny").refusals()
    assert found.keys() == {"code", "legal"}
    assert (found["code"].dvc_md5, found["code"].settings, found["code"].reason) == (B, "two", "no \u2028 text")
    assert before - 5 < found["code"].since.timestamp() < time.time() + 5
    assert Ledger(uri, "another").refusals() == {}
    Ledger(uri, "another").forget_refusal("code")
    ledger.forget_refusal("code")
    assert ledger.refusals().keys() == {"legal"}


def test_a_ledger_of_before_gets_the_table_when_there_is_something_to_put_into_it(ledger: Ledger, uri: str) -> None:
    ledger.append("purge", details=PURGED)
    run_sql(uri, "DROP TABLE refusals")
    assert Ledger(uri, "tiny").refusals() == {}
    Ledger(uri, "tiny").forget_refusal("code")
    Ledger(uri, "tiny").refuse("code", dvc_md5=A, settings="one", reason="too small")
    assert ledger.refusals().keys() == {"code"}
    assert len(ledger.log()) == 1
