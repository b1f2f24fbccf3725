"""flows.lineage: records are checked, chained by digest, and files are verified against them."""

from __future__ import annotations

import json
import stat
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from flows.lineage.record import (
    DomainRecord,
    LineageError,
    build_record,
    domain_records,
    file_digests,
    read_record,
    record_digest,
    step_key,
    validate,
    verify_files,
    write_record,
)
from flows.lineage.schema import problem_with, schema_of
from support.records import a_domain, arguments


def test_a_record_reads_back_as_it_was_built(tmp_path: Path) -> None:
    record = build_record(**arguments())
    write_record(tmp_path / "lineage.json", record)
    again = read_record(tmp_path / "lineage.json")
    assert again == record
    assert record_digest(again) == record_digest(record)
    assert [domain["name"] for domain in record["domains"]] == ["code", "legal"]
    assert record["settings"] == {"prune": {"rounds": [0.6, 1.0]}}
    assert [path.name for path in tmp_path.iterdir()] == ["lineage.json"]  # nothing is left beside it


def test_a_built_record_shares_nothing_with_the_caller() -> None:
    settings = {"prune": {"sparsity": 0.5}}
    record = build_record(**arguments(settings=settings))
    settings["prune"]["sparsity"] = 0.9
    assert record["settings"] == {"prune": {"sparsity": 0.5}}


def test_the_root_has_no_parent_key_or_step() -> None:
    root = arguments(parent=None, key=None, step=None, domains=[], perplexity={}, dense_perplexity={}, layers=[])
    assert build_record(**root)["parent"] is None
    with pytest.raises(LineageError, match="key and step must be null"):
        build_record(**{**root, "key": "a" * 64})


def test_the_digest_follows_every_field() -> None:
    record = build_record(**arguments())
    assert record_digest(build_record(**arguments(weights_back=18))) != record_digest(record)
    shuffled = dict(reversed(list(record.items())))
    assert record_digest(shuffled) == record_digest(record)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights_back": -1}, "weights_back must be a whole number of at least 0 or null, not -1"),
        ({"weights_back": True}, "weights_back must be a whole number"),
        ({"created": "2026-01-02T03:04:05"}, "created must be a UTC time"),
        ({"perplexity_before": float("nan")}, "perplexity_before cannot be written as JSON"),
        ({"hardware": {"memory": float("inf")}}, "hardware cannot be written as JSON"),
        ({"settings": {"path": Path("x")}}, "settings cannot be written as JSON"),
        ({"seconds": {"statistics": 1, "solve": 2}}, r"seconds\.evaluate is missing"),
        ({"base": {"fingerprint": "b", "source": "s", "more": 1}}, r"base\.more is not a field"),
        ({"parent": {"version": 2, "digest": "short"}}, r"parent\.digest must be a SHA-256"),
        ({"files": {"../other": "0" * 64}}, "files must be paths of files inside the version.s folder"),
        ({"perplexity": {"code": 8.6}}, "must name the same domains"),
        ({"step": a_domain("medical")}, "step must be one of the domains"),
        ({"domains": [a_domain("legal"), a_domain("legal")]}, "each name once"),
    ],
)
def test_a_bad_value_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(LineageError, match=message):
        build_record(**arguments(**change))


def test_a_bad_domain_is_named_with_its_field() -> None:
    record = build_record(**arguments())
    record["domains"][1]["tokens"] = "many"
    with pytest.raises(LineageError, match=r"^here: domains\[1\]\.tokens must be a whole number .* not 'many'$"):
        validate(record, "here")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[]", "must be a JSON object"),
        (b"{}", "schema is None"),
        (b'{"schema": "copal.lineage/1"}', "schema is 'copal.lineage/1', this copal reads 'copal.lineage/2'"),
        (b'{"schema": "copal.lineage/2"}', "backward_transfer is missing"),
    ],
)
def test_what_is_no_record_is_refused(tmp_path: Path, text: bytes, message: str) -> None:
    path = tmp_path / "lineage.json"
    path.write_bytes(text)
    with pytest.raises(LineageError, match=message) as error:
        read_record(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_record_is_a_lineage_error(tmp_path: Path) -> None:
    with pytest.raises(LineageError, match="cannot be read"):
        read_record(tmp_path / "lineage.json")


def test_nan_in_a_file_is_refused(tmp_path: Path) -> None:
    record = build_record(**arguments())
    text = json.dumps({**record, "perplexity": {"code": float("nan"), "legal": 1.0}})
    (tmp_path / "lineage.json").write_text(text)
    with pytest.raises(LineageError, match=r"perplexity\.code must be a finite number"):
        read_record(tmp_path / "lineage.json")


def test_writing_replaces_a_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "lineage.json"
    path.write_text("half a rec")
    path.chmod(stat.S_IRUSR)  # replaced by renaming, never written into
    write_record(path, build_record(**arguments()))
    assert read_record(path)["model"] == "tiny"


def test_domains_of_a_record_go_into_a_child_with_their_version() -> None:
    domains = domain_records(build_record(**arguments()), version=3)
    assert {domain.name: domain.contribution_version for domain in domains} == {"code": 2, "legal": 3}
    assert domains[0] == a_domain("code", 2)


def test_verify_files_tells_what_differs(tmp_path: Path) -> None:
    for name in ("model/config.json", "model/a/weights.safetensors", "state/manifest.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    files = file_digests(tmp_path / "model", tmp_path) | file_digests(tmp_path / "state", tmp_path)
    assert sorted(files) == ["model/a/weights.safetensors", "model/config.json", "state/manifest.json"]
    record = build_record(**arguments(files=files))
    (tmp_path / "report.md").write_text("not part of the record")
    assert verify_files(record, tmp_path) == []

    (tmp_path / "model/config.json").write_bytes(b"tampered")
    (tmp_path / "state/manifest.json").unlink()
    (tmp_path / "state/other.json").write_bytes(b"")
    assert verify_files(record, tmp_path) == [
        "changed: model/config.json",
        "missing: state/manifest.json",
        "extra: state/other.json",
    ]


def test_a_sum_that_was_dropped_may_be_missing_but_not_changed(tmp_path: Path) -> None:
    for name in ("state/manifest.json", "state/sum/block-00000.safetensors", "state/sum/block-00001.safetensors"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    record = {"files": file_digests(tmp_path / "state", tmp_path)}
    (tmp_path / "state/sum/block-00000.safetensors").unlink()
    (tmp_path / "state/sum/block-00001.safetensors").write_text("damaged")
    changed = "changed: state/sum/block-00001.safetensors"
    assert verify_files(record, tmp_path) == ["missing: state/sum/block-00000.safetensors", changed]
    assert verify_files(record, tmp_path, sum_dropped=True) == [changed]
    (tmp_path / "state/manifest.json").unlink()
    assert verify_files(record, tmp_path, sum_dropped=True) == ["missing: state/manifest.json", changed]


def test_a_folder_that_is_not_there_has_no_files(tmp_path: Path) -> None:
    assert file_digests(tmp_path / "state", tmp_path) == {}


def test_a_key_follows_each_of_its_parts() -> None:
    keys = {
        step_key(2, "legal", "a", "f"),
        step_key(3, "legal", "a", "f"),
        step_key(2, "code", "a", "f"),
        step_key(2, "legal", "b", "f"),
        step_key(2, "legal", "a", "g"),
    }
    assert len(keys) == 5
    assert step_key(2, "legal", "a", "f") in keys


def test_the_published_schemas_are_json_schemas() -> None:
    from jsonschema import Draft202012Validator

    record = build_record(**arguments())
    for name in ("copal.lineage/2", "copal.log/1"):
        Draft202012Validator.check_schema(schema_of(name))
    Draft202012Validator(schema_of("copal.lineage/2")).validate(record)  # as anybody would, without this code
    domain = schema_of("copal.lineage/2")["$defs"]["domain"]
    assert sorted(domain["properties"]) == domain["required"] == sorted(field.name for field in fields(DomainRecord))


@pytest.mark.parametrize("field", sorted(build_record(**arguments())))
def test_a_field_that_is_missing_or_of_another_type_is_named(field: str) -> None:
    record = build_record(**arguments())
    assert problem_with({**record, field: 1.0 if field == "weights_back" else True}, record["schema"]).startswith(field)
    del record[field]
    assert problem_with(record, "copal.lineage/2") == f"{field} is missing"
