"""The flows that move `champion`; what a promotion is, test_aliases.py says."""

from __future__ import annotations

import pytest
from prefect.client.orchestration import get_client

from flows.gates.champion import PromotionError
from flows.promote import promote, rollback
from flows.registry.errors import RegistryError
from support.toys import step


def test_the_flows_promote_and_roll_back(prefect, make_learnt_bench, tmp_path) -> None:
    bench = make_learnt_bench(tmp_path / "workspace")
    step(bench)
    here = str(bench.root)
    assert promote(here, "1") == 2
    assert promote(here, "challenger", why="ticket 12") == 3
    assert bench.registry.alias("champion") == 2
    assert promote(here, "2") is None
    assert rollback(here, why="it is slow") == 4
    assert bench.registry.alias("champion") == 1
    assert [entry.why for entry in bench.log[1:]] == [None, "ticket 12", "it is slow"]
    with get_client(sync_client=True) as client:
        shown = client.request(
            "POST", "/artifacts/latest/filter", json={"artifacts": {"key": {"any_": ["tiny-champion"]}}}
        )
    (artifact,) = shown.json()
    assert "rollback of tiny from version 2 to version 1: it is slow (log entry 4)" in artifact["data"]

    with pytest.raises(PromotionError, match="nothing to go back to"):
        rollback(here)
    with pytest.raises(RegistryError, match="no version or alias 'staging'; aliases: challenger, champion, latest"):
        promote(here, "staging")
    bench.set("model: {name: tiny", "gates: {dense: 1.0001}\nmodel: {name: tiny")
    step(bench, "legal")
    with pytest.raises(PromotionError, match=r"version 3 of tiny failed its gates \(dense\)"):
        promote(here, "latest")
    assert promote(here, "latest", why="a demo", force=True) == 6
