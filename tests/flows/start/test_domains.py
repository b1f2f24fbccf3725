from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from copal.documents import read_documents, split_documents
from flows.models.packages import FetchError
from flows.start import domains
from flows.start.domains import DOMAINS, build_domain

ROOT = Path(__file__).parents[3]

ICD = """<ICD10CM.tabular><chapter><name>1</name><desc>Infections (A00-B99)</desc>
<includes><note>of a chapter, not repeated</note></includes>
<section id="A00-A09"><desc>Intestinal</desc>
<diag><name>A00</name><desc>Cholera</desc>
  <excludes1><note>carrier (Z22)</note><note>other
     germs</note></excludes1>
  <diag><name>A00.0</name><desc>Cholera due to {name}</desc>
    <inclusionTerm><note>Classical cholera</note></inclusionTerm></diag></diag>
<diag><name>A99</name><desc>Too short to be a document</desc></diag>
</section></chapter></ICD10CM.tabular>"""


@pytest.mark.parametrize("name", ["code", "legal"])
def test_a_demo_domain_is_the_same_each_time_and_enough(name: str, tmp_path: Path) -> None:
    count = build_domain(name, tmp_path / "one" / name)
    assert build_domain(name, tmp_path / "two") == count

    file = tmp_path / "one" / name / "documents.jsonl"
    assert file.read_bytes() == (tmp_path / "two" / "documents.jsonl").read_bytes()
    assert list(file.parent.iterdir()) == [file]
    assert file.stat().st_size < 3_300_000
    documents = read_documents(file.parent)
    assert len(documents) == count
    assert all(document.identity.startswith("id:") for document in documents)
    for side, windows in zip(split_documents(documents, 0.2), (24, 16), strict=True):
        # four characters a token are what English text gives; code and licences give fewer
        assert sum(len(document.text) for document in side) > windows * 512 * 4


def test_code_is_code_and_no_tests(tmp_path: Path) -> None:
    build_domain("code", tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "documents.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(row["id"].endswith(".py") for row in rows)
    assert not any({"test", "tests", "site-packages"}.intersection(row["id"].split("/")) for row in rows)
    assert sum("def " in row["text"] for row in rows) > len(rows) / 2


def test_medical_is_one_readable_document_a_category(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tabular = tmp_path / "tabular.xml"
    tabular.write_text(ICD.format(name="Vibrio cholerae 01, biovar cholerae " * 5))
    monkeypatch.setattr(domains, "package_file", lambda *_: tabular)

    assert build_domain("medical", tmp_path / "medical") == 1

    (document,) = read_documents(tmp_path / "medical")
    assert document.identity == "id:A00"
    lines = document.text.splitlines()
    assert lines[:4] == [
        "Chapter 1: Infections (A00-B99)",
        "",
        "A00 Cholera.",
        "Never coded together with: carrier (Z22); other germs.",
    ]
    assert lines[4].startswith("A00.0 Cholera due to Vibrio")
    assert lines[5] == "This diagnosis covers: Classical cholera."


def test_an_unknown_domain_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="no demo domain 'poems'; there are code, legal, medical"):
        build_domain("poems", tmp_path / "poems")
    assert list(tmp_path.iterdir()) == []


def test_the_command_that_dvc_runs(tmp_path: Path) -> None:
    stage = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["domain"]
    assert tuple(stage["foreach"]) == DOMAINS
    assert stage["do"]["cmd"] == "python -m flows.start.domains ${item} data/${item}"
    for name, code in (("legal", 0), ("poems", 2)):
        command = [sys.executable, "-m", "flows.start.domains", name, str(tmp_path / name)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
        assert run.returncode == code, run.stderr
        assert "Traceback" not in run.stderr
