"""flows.lineage: records are checked, chained by digest, and files are verified against them."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from copal.config import fingerprint
from flows.lineage.entries import parse_entry
from flows.lineage.files import file_digests, verify_files
from flows.lineage.keys import step_key
from flows.lineage.record import LineageError, Record, Seconds, Sparsity, parse_record, read_record, write_record
from flows.lineage.schema import FOLDER, published_schemas
from support.histories import a_domain, a_layer, a_record, a_root, three_domains

PLAIN = a_record().as_json()
SPELLINGS = {
    "seconds": Seconds(statistics=1, solve=1.0, evaluate=1e-5),
    "perplexity_before": 1e22,
    "weights_back": 0,
    "backward_transfer": -0.0,
    "settings": {
        "prune": {"sparsity": "2:4", "nothing": None, "yes": True, "one": 1, "float": 1.0},
        "ü": "é\u2028\U0001f600",
    },
    "sparsity": Sparsity(target="2:4", counted=0),
}


def a_withdrawal() -> Record:
    gone = {"name": "legal", "dvc_md5": "a" * 32 + ".dir"}
    figures = {"perplexity": {"code": 8.6}, "dense_perplexity": {"code": 6.8}}
    kept = [a_domain("code", 2).as_json()]
    return parse_record(PLAIN | {"step": None, "domains": kept, "withdrawn": [gone]} | figures, "here")


@pytest.mark.parametrize(
    ("make", "digest"),
    [
        (a_record, "234bafd755b53e976e382e53ec063e77d2efef7aa53b7e0804bc2fdb819477bf"),
        (a_root, "469acd3d5bd3cfb7acb985cbee1c57ae80fa1854c73c21bd637dba2a27ea96c3"),
        (lambda: a_record(**SPELLINGS), "94fb3e351f178ee514d8d2502e52e2549caa5d55bb09862e6524385a81a0fd38"),
        (a_withdrawal, "d6bebfcc959ddf9941ecbc1fb210ad4639cd31101d26424274557e490e308533"),
        *(
            (lambda number=number: three_domains().versions[number].record, digest)
            for number, digest in enumerate(
                (
                    "74bd8e46d872ab3b8d58829dd3793522755e2695c6a1070a94e3f44b4a821f64",
                    "1e2bf7425534e25a6f8815b52395b83eac8547c59877fef2b93c7b96ad4b0ffc",
                    "859273b6b28533cf06f5ef65a494851141ea0f56769634041faae8a5b57ce546",
                    "26337892ac0762f74d159b3b225a4d636944d7fe616d463ae0052b59e1a61616",
                    "891782b81563f25cdb7714c6f9adb383bd9829e27e0b29a58ed05f195b6037d3",
                    "b1f5abf39353d98c3b4296ed971fecfd5a57dba0d1ca2a8084e7b4b273e0dfe9",
                )
            )
        ),
    ],
)
def test_a_record_has_the_digest_that_it_always_had(tmp_path: Path, make: Any, digest: str) -> None:
    record = make()
    assert record.digest == fingerprint(record.as_json()) == digest
    write_record(tmp_path / "lineage.json", record)
    assert read_record(tmp_path / "lineage.json").digest == digest


numbers = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
plain = st.recursive(
    st.none() | st.booleans() | numbers | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
)


@given(
    settings=st.dictionaries(st.text(st.characters(codec="utf-8")), plain, max_size=4),
    figures=st.tuples(numbers, numbers, numbers),
)
def test_every_value_stays_as_it_was_spelled(settings: dict[str, Any], figures: tuple[float, float, float]) -> None:
    before, counted, error = figures
    layers = [a_layer().as_json() | {"layer_error_after": error, "damping": counted}]
    changes = {"settings": settings, "perplexity_before": before, "layers": layers}
    value = PLAIN | changes | {"sparsity": {"target": counted, "counted": counted}}
    record = parse_record(json.loads(json.dumps(value)), "here")
    assert json.dumps(record.as_json(), sort_keys=True) == json.dumps(value, sort_keys=True)
    assert record.digest == fingerprint(value)


def test_a_record_reads_back_as_it_was_made(tmp_path: Path) -> None:
    record = a_record()
    write_record(tmp_path / "lineage.json", record)
    assert read_record(tmp_path / "lineage.json") == record
    assert record.settings == {"prune": {"rounds": [0.6, 1.0]}}
    assert [path.name for path in tmp_path.iterdir()] == ["lineage.json"]  # nothing is left beside it


def test_a_record_shares_nothing_with_who_made_it_and_is_not_changed() -> None:
    settings, perplexity = {"prune": {"sparsity": 0.5}}, {"code": 8.6, "legal": 18.7}
    record = a_record(settings=settings, perplexity=perplexity)
    settings["prune"]["sparsity"] = 0.9
    perplexity["code"] = 1.0
    assert record.settings == {"prune": {"sparsity": 0.5}}
    assert record.perplexity["code"] == 8.6
    with pytest.raises(ValueError, match="frozen"):
        record.model = "other"


def test_the_root_has_no_parent_key_or_step() -> None:
    assert a_root().parent is None
    with pytest.raises(LineageError, match="key and step must be null"):
        a_root(key="a" * 64)


def test_the_digest_follows_every_field() -> None:
    assert a_record(weights_back=18).digest != a_record().digest
    shuffled = parse_record(dict(reversed(list(PLAIN.items()))), "here")
    assert shuffled.digest == a_record().digest


MANY = [a_domain(name).as_json() for name in ("code", "legal", "medical")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights_back": -1}, r"weights_back must be a whole number of at least 0 or null, not -1$"),
        ({"weights_back": True}, "weights_back must be a whole number"),
        ({"weights_back": 1.0}, r"weights_back must be a whole number .*, not 1\.0$"),
        ({"created": "2026-01-02T03:04:05"}, "created must be a UTC time"),
        ({"created": "2026-01-02T03:04:05+02:00"}, "created must be a UTC time"),
        ({"created": "2026-13-02T03:04:05Z"}, "created must be a UTC time"),
        ({"perplexity_before": float("nan")}, "perplexity_before must be a finite number or null, not nan$"),
        ({"perplexity_before": True}, "perplexity_before must be a finite number or null, not True$"),
        ({"perplexity_before": "1"}, "perplexity_before must be a finite number or null, not '1'$"),
        ({"hardware": {"memory": float("inf")}}, "hardware must be a JSON object of plain values"),
        ({"settings": {"path": Path("x")}}, "settings must be a JSON object of plain values"),
        ({"seconds": {"statistics": 1, "solve": 2}}, r"seconds\.evaluate is missing$"),
        ({"base": {"fingerprint": "b", "source": "s", "more": 1}}, r"base\.more is not a field"),
        ({"more": 1}, "here: more is not a field"),
        ({"parent": {"version": 2, "digest": "short"}}, r"parent\.digest must be a SHA-256"),
        ({"files": {"../other": "0" * 64}}, "files must be paths of files inside the version's folder"),
        ({"files": {"/other": "0" * 64}}, "files must be paths of files inside the version's folder"),
        ({"files": {"model/x": "0" * 63}}, "files.model/x must be a SHA-256"),
        ({"layers": [PLAIN["layers"][0] | {"tokens": None}]}, r"layers\[0\]\.tokens must be a whole number"),
        ({"domains": [True]}, r"domains\[0\] must be a JSON object, not True$"),
        ({"domains": [MANY[0], MANY[1] | {"tokens": "many"}]}, r"domains\[1\]\.tokens must be a whole .* not 'many'$"),
        ({"perplexity": {"code": 8.6}}, "must name the same domains"),
        ({"step": MANY[2]}, "step must be one of the domains, and 'medical' is not"),
        ({"domains": [MANY[1], MANY[1]]}, "each name once"),
        ({"domains": [MANY[1], MANY[0]]}, "sorted by name"),
        ({"key": None}, "key must be there where parent is"),
        ({"step": None}, "without a step, the last of withdrawn must be a domain that is not in domains"),
    ],
)
def test_a_bad_value_is_refused_in_one_line_that_names_it(change: dict[str, Any], message: str) -> None:
    with pytest.raises(LineageError, match=message) as error:
        parse_record(PLAIN | change, "here")
    assert str(error.value).startswith("here: ")
    assert "\n" not in str(error.value)


def test_what_is_made_in_code_is_checked_in_the_same_way() -> None:
    with pytest.raises(LineageError, match=r"^lineage record: perplexity.code must be a finite number, not nan$"):
        a_record(perplexity={"code": float("nan"), "legal": 1.0})
    with pytest.raises(LineageError, match=r"^layer: layer_error_after must be a finite number or null, not inf$"):
        a_layer(layer_error_after=float("inf"))
    with pytest.raises(LineageError, match=r"^lineage record: perplexity and dense_perplexity must name"):
        a_record(perplexity={"code": 1.0})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[]", "must be a JSON object"),
        (b"{}", "schema is None"),
        (b'{"schema": "copal.lineage/1"}', "schema is 'copal.lineage/1', this copal reads 'copal.lineage/2'"),
        (b'{"schema": "copal.lineage/2"}', "model is missing"),
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
    text = json.dumps(PLAIN | {"perplexity": {"code": float("nan"), "legal": 1.0}})
    (tmp_path / "lineage.json").write_text(text)
    with pytest.raises(LineageError, match="NaN is no number"):
        read_record(tmp_path / "lineage.json")


def test_writing_replaces_a_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "lineage.json"
    path.write_text("half a rec")
    path.chmod(stat.S_IRUSR)  # replaced by renaming, never written into
    write_record(path, a_record())
    assert read_record(path).model == "tiny"


def test_domains_of_a_record_go_into_a_child_with_their_version() -> None:
    domains = a_record().domains_at(3)
    assert {domain.name: domain.contribution_version for domain in domains} == {"code": 2, "legal": 3}
    assert domains[0] == a_domain("code", 2)


def test_verify_files_tells_what_differs(tmp_path: Path) -> None:
    for name in ("model/config.json", "model/a/weights.safetensors", "state/manifest.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    files = file_digests(tmp_path / "model", tmp_path) | file_digests(tmp_path / "state", tmp_path)
    assert sorted(files) == ["model/a/weights.safetensors", "model/config.json", "state/manifest.json"]
    record = a_record(files=files)
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
    record = a_record(files=file_digests(tmp_path / "state", tmp_path))
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


@pytest.mark.parametrize("field", sorted(PLAIN))
def test_a_field_that_is_missing_or_of_another_type_is_named(field: str) -> None:
    with pytest.raises(LineageError, match=rf"^here: {field} (must be|is) "):
        parse_record(PLAIN | {field: 1.0 if field == "weights_back" else True}, "here")
    without = {name: value for name, value in PLAIN.items() if name != field}
    with pytest.raises(LineageError, match=f"^here: {field} is " + ("None" if field == "schema" else "missing$")):
        parse_record(without, "here")


# --- the published schemas


def schema(name: str) -> Draft202012Validator:
    value = json.loads((FOLDER / name).read_text())
    Draft202012Validator.check_schema(value)
    return Draft202012Validator(value)


def test_the_published_schemas_are_those_of_the_models() -> None:
    published = {path.name: path.read_text() for path in FOLDER.iterdir()}
    assert published == published_schemas(), "run python -m flows.lineage.schema"


@pytest.mark.parametrize("record", [a_record(), a_root(), a_withdrawal(), a_record(**SPELLINGS)])
def test_a_record_is_valid_by_the_published_schema(record: Record) -> None:
    schema("copal.lineage.2.json").validate(record.as_json())  # as anybody would, without this code


@pytest.mark.parametrize("field", sorted(PLAIN))
def test_the_published_schema_refuses_what_copal_refuses(field: str) -> None:
    found = schema("copal.lineage.2.json")
    assert not found.is_valid({name: value for name, value in PLAIN.items() if name != field})
    assert not found.is_valid(PLAIN | {field: True})
    assert not found.is_valid(PLAIN | {f"{field}_": PLAIN[field]})


def test_log_entries_are_valid_by_the_published_schema() -> None:
    found = schema("copal.log.1.json")
    for entry in three_domains().log:
        value = entry.as_json()
        found.validate(value)
        assert parse_entry(value, "here") == entry
        for field in value:
            assert not found.is_valid({name: each for name, each in value.items() if name != field})
        assert not found.is_valid(value | {"details": {}})
        assert not found.is_valid(value | {"kind": "party"})
