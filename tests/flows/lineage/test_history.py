"""The history of a lineage: read from a real registry, as a tree, as JSON and as OpenLineage events."""

from __future__ import annotations

import contextlib
import io
import json
import uuid
from datetime import datetime
from urllib.parse import urlsplit

import pytest

from flows.cli import main
from flows.lineage.history import History, HistoryError, find_version, measures, step_texts, summary, up_to
from flows.lineage.openlineage import events
from flows.project import append_log, read_history
from flows.terminal.chain import render_history
from flows.terminal.progress import console
from support.histories import MOVED, a_history, altered, md5, three_domains


def shown(history: History) -> str:
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream):
        console().print(render_history(history))
    return stream.getvalue()


def test_the_history_of_a_real_registry_is_plain_json(bench):
    project = bench.project
    entry = append_log(project, "promotion", version=1, to_version=1, why="first", details=MOVED)
    history = read_history(project)
    assert json.loads(json.dumps(history.as_json())) == history.as_json()
    (version,) = history.versions
    assert (history.model, version.number, version.parent, version.aliases) == ("tiny", 1, None, ("latest",))
    assert version.digest == version.record.digest == version.tags["copal.lineage_digest"]
    assert history.log == (entry,)


def test_the_history_as_json_has_the_fields_that_programs_read():
    found = three_domains().as_json()
    assert list(found) == ["model", "versions", "log"]
    version = found["versions"][4]
    assert list(version) == ["version", "parent", "aliases", "tags", "digest", "record", "signature"]
    assert (version["version"], version["parent"], version["aliases"]) == (5, 4, ["champion"])
    assert version["record"]["domains"][0]["name"] == "code"
    assert found["log"][0] == {
        "schema": "copal.log/1", "number": 1, "previous": None, "kind": "promotion",
        "when": "2026-03-01T09:00:00+00:00", "who": {"role": None, "user": "ada", "host": "host"}, "why": "first",
        "version": 2, "from": None, "to": 2,
        "details": {"alias": "champion", "forced": False, "gates": None, "logged_before": None},
    }  # fmt: skip


def test_the_tree_has_a_branch_a_version():
    lines = shown(three_domains()).splitlines()
    assert lines[0] == "tiny"
    branches = [line for line in lines if "── version" in line]
    assert [line.split("── ")[1].split("  ")[0] for line in branches] == [f"version {number}" for number in range(1, 7)]
    assert "dense base" in branches[0]
    mean = (13.0 * 8.2 * 7.0) ** (1 / 3)
    assert (
        f"med  {md5('med')[:10]}  perplexity {mean:.2f} ({mean / 6:.2f} x dense)  sparsity 0.500  champion"
        in branches[4]
    )
    assert "without code" in branches[5]
    text = "\n".join(lines)
    assert "gates failed: forgetting" in text
    assert "gates passed" in text
    assert "champion rolled back to it from version 4, 2026-03-05T12:00:00+00:00, by ada@host: legal is bad" in text
    assert "withdrew code, 2026-04-02T09:00:00+00:00, by ada@host: licence" in text


def test_what_others_wrote_neither_styles_nor_steers_the_terminal():
    hostile = "[bold]x[/bold] \x1b[2J\x1b]0;gone\x07 [/red]"
    text = shown(a_history([{"add": "a", "repository": hostile, "perplexity": {"a": 5.0}}]))
    assert "[bold]x[/bold]" in text
    assert "\x1b" not in text
    assert "\x07" not in text


def test_a_tree_without_versions():
    assert "no versions yet" in shown(History(model="tiny", versions=(), log=()))


def test_a_record_that_names_another_parent_shows():
    history = altered(three_domains(), 3, digest="0" * 64)
    assert [line.chained for line in summary(history)] == [None, True, True, False, True, True]
    assert "another digest than that of its parent" in shown(history)


def test_figures_compare_where_the_tokens_are_the_same():
    found = measures(three_domains())
    assert list(found) == ["legal", "code", "med"]
    assert [(m.version, m.newest_in, m.comparable) for m in found["legal"]] == [
        (2, 2, False),
        (3, 2, False),
        (4, 4, True),
        (5, 4, True),
        (6, 4, True),
    ]


def test_a_version_has_a_number_or_an_alias():
    history = three_domains()
    assert find_version(history, "champion").number == 5
    assert [version.number for version in up_to(history, "3").versions] == [1, 2, 3]
    assert step_texts(history) == {1: "dense base", 2: "legal", 3: "code", 4: "legal", 5: "med", 6: "without code"}
    with pytest.raises(HistoryError):
        up_to(history, "best")


# --- OpenLineage


def test_events_have_what_the_specification_demands():
    found = events(three_domains())
    assert [event["eventType"] for event in found] == ["START", "COMPLETE"] * 6
    for event in found:
        assert datetime.fromisoformat(event["eventTime"]).utcoffset() is not None
        uuid.UUID(event["run"]["runId"])
        assert event["job"]["namespace"]
        assert event["job"]["name"] == "tiny.adapt"
        assert urlsplit(event["producer"]).scheme
        assert event["schemaURL"].startswith("https://openlineage.io/spec/2-0-2/")
        datasets = event["inputs"] + event["outputs"]
        assert all(dataset["namespace"] and dataset["name"] for dataset in datasets)
        facets = [facet for one in (event["job"], *datasets) for facet in one["facets"].values()]
        assert all(urlsplit(facet[name]).scheme for facet in facets for name in ("_producer", "_schemaURL"))
    for start, complete in zip(found[::2], found[1::2], strict=True):
        assert start["run"] == complete["run"]
        seconds = datetime.fromisoformat(complete["eventTime"]) - datetime.fromisoformat(start["eventTime"])
        assert seconds.total_seconds() == 6


def test_a_run_reads_data_and_parent_and_writes_the_version():
    event = events(three_domains())[9]
    read = [(one["namespace"], one["name"], one["facets"]["version"]["datasetVersion"]) for one in event["inputs"]]
    assert read == [
        ("https://git.example/data", "data/code", md5("code")),
        ("https://git.example/data", "data/legal", md5("legal", 2)),
        ("https://git.example/data", "data/med", md5("med")),
        ("copal", "tiny", "4"),
    ]
    (made,) = event["outputs"]
    assert (made["name"], made["facets"]["version"]["datasetVersion"]) == ("tiny", "5")


def test_an_export_made_again_names_the_same_runs():
    first, again = events(three_domains()), events(three_domains())
    assert first == again
    assert len({event["run"]["runId"] for event in first}) == 6


@pytest.mark.parametrize(
    ("repository", "uri"),
    [
        ("https://git.example/a b", "https://git.example/a%20b"),
        ("git@git.example:team/data.git", "ssh://git@git.example/team/data.git"),
        ("/srv/my data", "file:///srv/my%20data"),
        ("what is this", "urn:copal:repository:what%20is%20this"),
    ],
)
def test_every_repository_is_named_by_a_uri(repository, uri):
    event = events(a_history([{"add": "a", "repository": repository}]))[-1]
    assert event["inputs"][0]["namespace"] == event["inputs"][0]["facets"]["dataSource"]["uri"] == uri


# --- the command


def test_the_command_on_a_real_registry(bench, capsys, tmp_path):
    def lineage(*arguments: str) -> str:
        assert main(["lineage", *arguments, "--workspace", str(bench.root)]) == 0
        return capsys.readouterr().out

    assert "version 1" in lineage()
    assert json.loads(lineage("latest", "--json")) == read_history(bench.project).as_json()
    page, run_events = tmp_path / "page.html", tmp_path / "events.jsonl"
    lineage("1", "--html", str(page))
    assert "<title>Lineage of tiny</title>" in page.read_text()
    lineage("--openlineage", str(run_events))
    assert [json.loads(line)["eventType"] for line in run_events.read_text().splitlines()] == ["START", "COMPLETE"]
    assert main(["lineage", "2", "--workspace", str(bench.root)]) == 2
    assert "no version or alias '2'" in capsys.readouterr().err
    for file in (tmp_path / "no" / "page.html", tmp_path):
        assert main(["lineage", "--html", str(file), "--workspace", str(bench.root)]) == 2
        assert "name a file in a folder that exists" in capsys.readouterr().err
