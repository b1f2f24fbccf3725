"""The session on the front page, run from its text: with a toy in place of the model, and made-up tickets."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from flows.data.git import git
from support.benches import sentence
from support.pages import blocks, commands

PAGE = Path(__file__).parents[3] / "README.md"


def test_the_session_on_the_front_page_runs_as_it_stands_there(run, tiny_base, tmp_path, monkeypatch):
    (session,) = [block for block in blocks(PAGE.read_text(encoding="utf-8"), "sh") if "copal init" in block]
    tickets = [json.dumps({"id": f"ticket-{number}", "text": sentence(0, number)}) for number in range(240)]
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "tickets.jsonl").write_text("\n".join(tickets) + "\n")
    monkeypatch.chdir(tmp_path)
    said = {}
    for words in commands(session):
        match words:
            case ["source", ".venv/bin/activate"]:
                continue
            case ["cd", folder]:
                monkeypatch.chdir(folder)
            case ["copal", command, *rest]:
                given = [
                    str(tiny_base) if word == "MODEL" else word.replace("~", str(tmp_path / "home")) for word in rest
                ]
                code, said[command], err = run(command, *given)
                assert code == 0, (command, err)
            case _:
                pytest.fail(f"the session has a command that this test does not run: {words}")
    assert list(said) == ["init", "add", "watch", "status", "export"]
    assert "adapted to support" in said["watch"]
    assert re.search(r"^ +2  support ", said["status"], re.MULTILINE)
    assert git(Path.cwd(), "ls-files", "data").split() == ["data/.gitignore", "data/README.md", "data/support.dvc"]
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.num_hidden_layers == 2
