"""Settings, names, records, log entries and pointers that somebody altered: one line, in bounded time and memory."""

from __future__ import annotations

import json
import random
import re
from functools import partial
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from copal.errors import DataError, SettingsError
from flows.data.versions import _parse_pointer
from flows.lineage.entries import parse_entry
from flows.lineage.record import LineageError, read_record
from flows.params import load_settings
from flows.settings import check_domain_name
from support.damage import FEW_AND_MANY, MemoryBound, altered, damaged, survives
from support.histories import a_record, three_domains

PARAMS = Path(__file__).parents[2] / "params.yaml"
POINTER = b"outs:\n- md5: 0123456789abcdef0123456789abcdef.dir\n  size: 1\n  nfiles: 1\n  hash: md5\n  path: code\n"


@pytest.fixture(autouse=True)
def no_stores_of_the_environment(monkeypatch):
    for name in ("COPAL_REGISTRY_URI", "MLFLOW_TRACKING_URI", "COPAL_LEDGER_URI"):
        monkeypatch.delenv(name, raising=False)


@FEW_AND_MANY
def test_altered_settings_are_read_or_refused(tmp_path, count):
    path, drawn, refused = tmp_path / "params.yaml", random.Random(4), 0
    whole = PARAMS.read_bytes()
    value = YAML(typ="safe").load(whole)
    with MemoryBound():
        for number in range(count):
            content = damaged(whole, drawn) if number % 5 == 0 else json.dumps(altered(value, drawn)).encode()
            path.write_bytes(content)
            refused += bool(survives(partial(load_settings, path), SettingsError))
    assert refused > count // 2


def bomb() -> str:
    """Three hundred bytes that spell ten thousand million values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    return "\n".join(lines)


@pytest.mark.quick
@pytest.mark.parametrize("text", [bomb(), "[" * 900, "a: " * 900, "&a [*a]", "x: 1\n" * 300_000], ids=range(5))
def test_yaml_beyond_its_bounds_is_refused(tmp_path, text):
    (tmp_path / "params.yaml").write_text(text)
    with MemoryBound():
        assert survives(lambda: load_settings(tmp_path / "params.yaml"), SettingsError)
        assert not _parse_pointer(text.encode()) or text.startswith("x")


@FEW_AND_MANY
def test_an_altered_pointer_names_its_data_or_none(count):
    drawn = random.Random(5)
    value = YAML(typ="safe").load(POINTER)
    with MemoryBound():
        for number in range(count):
            content = damaged(POINTER, drawn) if number % 2 else json.dumps(altered(value, drawn)).encode()
            assert survives(partial(_parse_pointer, content)) == ""


@FEW_AND_MANY
def test_an_altered_record_is_read_or_refused(tmp_path, count):
    path, drawn, refused = tmp_path / "lineage.json", random.Random(6), 0
    value = a_record().as_json()
    whole = json.dumps(value).encode()
    with MemoryBound():
        for number in range(count):
            content = damaged(whole, drawn) if number % 2 else json.dumps(altered(value, drawn)).encode()
            path.write_bytes(content)
            refused += bool(survives(partial(read_record, path), LineageError))
    assert refused > count // 2


@FEW_AND_MANY
def test_an_altered_entry_of_the_log_is_read_or_refused(count):
    drawn, refused = random.Random(7), 0
    entries = [entry if isinstance(entry, dict) else entry.as_json() for entry in three_domains().log]
    with MemoryBound():
        for _ in range(count):
            value = altered(drawn.choice(entries), drawn)
            refused += bool(survives(partial(parse_entry, value, "entry 1"), LineageError))
    assert refused > count // 2


@FEW_AND_MANY
def test_a_name_of_a_domain_is_a_plain_name_or_refused(count):
    drawn = random.Random(8)
    letters = "abcXYZ019-_. /\\\0\n\x1b\u202e\ud800éß漢\u2028%:*?<>|\"'"
    for _ in range(count):
        name = "".join(drawn.choices(letters, k=drawn.choice([0, 1, 2, 5, 200, 5000])))
        if not survives(partial(check_domain_name, name), DataError):
            assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name)
