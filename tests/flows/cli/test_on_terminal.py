"""Commands on a terminal: views that go when they are done, and nothing of what libraries do to streams."""

from __future__ import annotations

import re

import pytest

from flows.isolated import isolated_environment, isolated_python
from support.terminals import on_terminal

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture
def shown(tmp_path):
    """shown(*arguments) -> the text that a command leaves on a terminal, and all that was sent there."""

    def call(*arguments: object) -> tuple[str, str]:
        environment = isolated_environment() | {"TERM": "xterm-256color", "HOME": str(tmp_path)}
        code, sent = on_terminal(isolated_python("flows.cli", *map(str, arguments)), environment)
        assert code == 0, sent
        return _CONTROL.sub("", sent.rpartition("\x1b[2K")[2]), sent

    return call


def test_a_look_shows_what_it_does_and_leaves_its_table_alone(bench, shown):
    bench.commit("code", 0)
    text, sent = shown("status", "--workspace", bench.root)
    assert "reading the registry" in sent
    assert text.startswith("tiny: 1 version")
    assert "\\x1b" not in text  # DVC resets colours as the process ends, which is no text


def test_bars_stay_above_what_was_done(tiny_base, shown, tmp_path):
    text, _ = shown("init", tmp_path / "new", "--base", tiny_base)
    *bars, made, next_one, end = text.replace("\r", "").split("\n")
    assert [bar.split()[0] for bar in bars] == ["check", "copy", "fingerprint", "register"]
    assert made.startswith(f"workspace {tmp_path / 'new'}, model new, base ")
    assert next_one.startswith("next: a domain, copal add DOMAIN PATH...")
    assert end == ""
