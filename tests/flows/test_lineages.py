"""Several lineages in one registry do not touch one another."""

from __future__ import annotations

import json

import pytest
from mlflow import MlflowClient

from flows.cli import main
from flows.project import append_log, hold_lineage, read_log
from flows.step.gc import collect
from flows.verification.verify import verify
from support.histories import MOVED
from support.toys import holder, step


@pytest.fixture
def two(bench):
    """The lineages tiny (base, code, legal) and tiny.claim-b (base, legal) in one store; the settings name tiny.

    The second is named almost as claims of the first are.
    """
    for seed, domain in enumerate(("code", "legal")):
        bench.commit(domain, seed)
        step(bench, domain)
    bench.set("name: tiny", "name: tiny.claim-b")
    bench.register_root()
    step(bench, "legal")
    bench.set("name: tiny.claim-b", "name: tiny")
    return bench


@pytest.fixture
def other(two):
    two.set("name: tiny", "name: tiny.claim-b")
    found = two.project
    two.set("name: tiny.claim-b", "name: tiny")
    return found


def test_versions_logs_and_sums_of_two_names_are_apart(two, other):
    assert [(v.number, v.tags.get("copal.domain")) for v in two.registry.versions()] == [
        (1, None),
        (2, "code"),
        (3, "legal"),
    ]
    assert [(v.number, v.tags.get("copal.domain")) for v in other.registry.versions()] == [(1, None), (2, "legal")]
    append_log(two.project, "promotion", version=3, to_version=3, details=MOVED)
    assert [entry.kind for entry in read_log(other)] == ["gates"]
    append_log(other, "promotion", version=2, to_version=2, why="of the other", details=MOVED)
    promotions = [[e.to_version for e in read_log(one) if e.kind == "promotion"] for one in (two.project, other)]
    assert promotions == [[3], [2]]

    before = {
        path: path.stat().st_size
        for path in other.registry.folder(other.registry.version(2)).rglob("*")
        if path.is_file()
    }
    assert collect(two.project)  # the sum of version 2 of tiny, not of tiny.claim-b
    assert {path: path.stat().st_size for path in before if path.exists()} == before
    assert two.registry.version(2).sum_dropped
    assert not other.registry.version(2).sum_dropped
    for project in (two.project, other):
        for version in project.registry.versions():
            assert verify(project, version, data=False).findings == ()


def test_who_holds_one_lineage_does_not_keep_others_waiting(two, other):
    with hold_lineage(two.project, "a long step") as held, hold_lineage(other, "another") as claim:
        held.check()
        claim.check()
        assert [holder(one)["what"] for one in (two.project, other)] == ["a long step", "another"]


def test_status_all_shows_every_lineage_and_nothing_else(two, capsys):
    uri = two.registry.tracking_uri
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    client.create_registered_model("somebody-elses")
    client.set_registered_model_alias("tiny", "champion", "2")
    names = {model.name for model in client.search_registered_models()}
    assert names == {"tiny", "tiny.claim-b", "somebody-elses"}  # and nothing that is no model
    here = ["--workspace", str(two.root)]
    assert main(["status", "--all", "--json", *here]) == 0
    told = json.loads(capsys.readouterr().out)
    for lineage in told["lineages"]:
        lineage["aliases"].pop("challenger", None)  # as the gates had it
    assert told == {
        "lineages": [
            {
                "model": "tiny",
                "head": 3,
                "versions": [1, 2, 3],
                "domains": ["code", "legal"],
                "aliases": {"champion": 2, "latest": 3},
            },
            {"model": "tiny.claim-b", "head": 2, "versions": [1, 2], "domains": ["legal"], "aliases": {"latest": 2}},
        ]
    }
    assert main(["status", "--all", *here]) == 0
    shown = capsys.readouterr().out
    assert "tiny*" in shown
    assert "tiny.claim-b" in shown
    assert "champion: 2" in shown
    assert "latest: 3" in shown
    assert ".claim-0" not in shown
    assert "somebody-elses" not in shown
