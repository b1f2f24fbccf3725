"""The flow that verifies what aliases name; what a verification finds, test_verify.py says."""

from __future__ import annotations

import json

import pytest
from prefect.client.orchestration import get_client

from flows.gates.champion import make_champion
from flows.registry.errors import RegistryError
from flows.verify import VerifyError, verify
from support.toys import step


def artifact() -> dict[str, tuple[str, str]]:
    """What the run's page shows: version -> its aliases, and what differs."""
    with get_client(sync_client=True) as client:
        found = client.request(
            "POST", "/artifacts/latest/filter", json={"artifacts": {"key": {"any_": ["tiny-verify"]}}}
        )
    (newest,) = found.json()
    assert newest["type"] == "table"
    return {str(row["version"]): (row["aliases"], row["differs"]) for row in json.loads(newest["data"])}


def test_it_fails_where_a_version_with_an_alias_is_not_what_was_registered(
    prefect, make_learnt_bench, tmp_path
) -> None:
    bench = make_learnt_bench(tmp_path / "workspace")
    for domain in ("code", "legal"):
        step(bench, domain)
    make_champion(bench.project, 1)
    here = str(bench.root)
    assert verify(here) == [1, 3]  # version 2 has no alias any more
    assert artifact() == {"1": ("champion", "nothing"), "3": ("challenger, latest", "nothing")}

    weights = next((bench.registry.folder(bench.registry.version(3)) / "model").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(VerifyError, match=rf"tiny: version 3: changed: model/{weights.name}"):
        verify(here)
    assert f"changed: model/{weights.name}" in artifact()["3"][1]
    assert artifact()["1"] == ("champion", "nothing")
    assert verify(here, version="champion") == [1]
    assert verify(here, version="2", data=False) == [2]
    with pytest.raises(RegistryError, match="no version 9"):
        verify(here, version="9")

    bench.lose_data()
    with pytest.raises(VerifyError, match="version 2: data of code"):
        verify(here, version="2")
