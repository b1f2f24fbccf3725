"""The flow that verifies what aliases name; what a verification finds, test_verify.py says."""

from __future__ import annotations

import pytest
from prefect.client.orchestration import get_client
from toys import step

from flows.audit import AuditError, audit
from flows.gates.champion import make_champion
from flows.registry.errors import RegistryError


def artifact() -> str:
    with get_client(sync_client=True) as client:
        found = client.request("POST", "/artifacts/latest/filter", json={"artifacts": {"key": {"any_": ["audit"]}}})
    (newest,) = found.json()
    return str(newest["data"])


def test_an_audit_fails_where_a_version_with_an_alias_is_not_what_was_registered(
    prefect, make_learnt_bench, tmp_path
) -> None:
    bench = make_learnt_bench(tmp_path / "workspace")
    for domain in ("code", "legal"):
        step(bench, domain)
    make_champion(bench.project, 1)
    here = str(bench.root)
    assert audit(here) == [1, 3]  # version 2 has no alias any more
    assert "| 3 | challenger, latest | nothing |" in artifact()

    weights = next((bench.registry.folder(bench.registry.version(3)) / "model").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(AuditError, match=rf"tiny: version 3: changed: model/{weights.name}"):
        audit(here)
    assert f"changed: model/{weights.name}" in artifact()
    assert "| 1 | champion | nothing |" in artifact()
    assert audit(here, version="champion") == [1]
    assert audit(here, version="2", data=False) == [2]
    with pytest.raises(RegistryError, match="no version 9"):
        audit(here, version="9")

    bench.lose_data()
    with pytest.raises(AuditError, match="version 2: data of code"):
        audit(here, version="2")
