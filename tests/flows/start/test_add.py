"""`copal add`: a user's files become a domain whole, or nothing is changed."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pytest

from flows.cli.doctor import doctor
from flows.data.git import git
from flows.pending.plan import plan
from flows.start.add import AddError, add_domain
from support.benches import Bench, text

DOCUMENTS = 24


def rows(seed: int, documents: int = DOCUMENTS) -> list[dict[str, str]]:
    return [{"id": f"{seed}-{number}", "text": text(seed, number)} for number in range(documents)]


def a_csv(path: Path, seed: int = 0) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "text"])
        writer.writeheader()
        writer.writerows(rows(seed))
    return path


def lines(path: Path, seed: int = 0) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows(seed)))
    return path


def a_json(path: Path, seed: int = 0) -> Path:
    path.write_text(json.dumps(rows(seed)))
    return path


def packed(path: Path, seed: int = 0) -> Path:
    path.write_bytes(gzip.compress("".join(f"{json.dumps(row)}\n" for row in rows(seed)).encode()))
    return path


def saved(path: Path, seed: int = 0) -> Path:
    from datasets import Dataset

    Dataset.from_list(rows(seed)).save_to_disk(str(path))
    return path


def state(bench: Bench) -> object:
    """All that an add which is refused must leave alone."""
    files = sorted(str(path.relative_to(bench.root)) for path in bench.workspace.data.rglob("*"))
    private = sorted(path.name for path in bench.workspace.private.glob("add-*"))
    return files, private, git(bench.root, "log", "--all", "--format=%H"), git(bench.root, "status", "--porcelain")


def test_the_pointer_is_committed_and_nothing_else(bench, tmp_path):
    bench.commit("first", 9)
    bench.write("raw", 3)  # of another domain, not tracked by DVC
    (bench.root / "notes.md").write_text("mine\n")
    git(bench.root, "add", "notes.md")
    found = add_domain(bench.project, "code", [lines(tmp_path / "some.jsonl")])
    assert git(bench.root, "show", "--name-only", "--format=%H").split() == [
        found.commit,
        "data/.gitignore",
        "data/code.dvc",
    ]
    assert git(bench.root, "diff", "--cached", "--name-only").split() == ["notes.md"]  # staged still
    assert [version.domain for version in plan(bench.project).pending] == ["first", "code"]
    assert found.documents["calibration"] + found.documents["evaluation"] == DOCUMENTS
    assert (found.files, found.left_out, found.unchecked) == (1, 0, ())
    (check,) = [check for check in doctor(bench.root) if check.name == "domains"]
    assert "data/raw" in check.found
    assert "copal add DOMAIN data/raw" in check.advice


@pytest.mark.parametrize(
    ("name", "write"),
    [("t.csv", a_csv), ("t.json", a_json), ("t.jsonl.gz", packed), ("saved", saved)],
    ids=["csv", "json", "gz", "saved"],
)
def test_tables_and_saved_datasets_hold_the_same_documents(bench, tmp_path, name, write):
    one = add_domain(bench.project, "code", [lines(tmp_path / "lines.jsonl")])
    other = add_domain(bench.project, "code", [write(tmp_path / name)], replace=True)
    assert (other.documents, other.windows) == (one.documents, one.windows)


def test_a_folder_and_several_paths(bench, tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    lines(tmp_path / "in" / "deep" / "one.jsonl")
    (tmp_path / "in" / "picture.png").write_bytes(b"\x89PNG")
    add_domain(bench.project, "code", [tmp_path / "in"])
    assert [path.name for path in (bench.workspace.data / "code").rglob("*.*")] == ["one.jsonl"]
    add_domain(bench.project, "law", [tmp_path / "in", lines(tmp_path / "two.jsonl", 1)])
    names = sorted(
        path.relative_to(bench.workspace.data).as_posix() for path in (bench.workspace.data / "law").rglob("*.*")
    )
    assert names == ["law/in/deep/one.jsonl", "law/two.jsonl"]


def test_data_that_lies_there_already_is_added_where_it_is(bench):
    bench.write("code", 0)
    found = add_domain(bench.project, "code", [bench.workspace.data / "code"])
    assert (bench.workspace.data / "code.dvc").is_file()
    assert [version.md5 for version in plan(bench.project).pending] != []
    assert found.commit == git(bench.root, "rev-parse", "HEAD").strip()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.pdf", b"%PDF", "is no text that copal reads"),
        ("t.jsonl", b'{"body": "x"}\n', "line 1"),
        ("t.csv", b"", "cannot be read"),
        ("t.json", b"{", "cannot be read"),
        ("t.txt", b"too little", "window"),
        (None, b"", "is not there"),
    ],
    ids=["kind", "field", "empty-csv", "cut-json", "little", "missing"],
)
def test_what_a_step_would_refuse_changes_nothing(bench, tmp_path, name, content, said):
    path = tmp_path / (name or "missing.txt")
    if name:
        path.write_bytes(content)
    before = state(bench)
    with pytest.raises(Exception, match=said):
        add_domain(bench.project, "code", [path])
    assert state(bench) == before


def test_data_is_replaced_only_where_that_is_asked_for(bench, tmp_path):
    add_domain(bench.project, "code", [lines(tmp_path / "one.jsonl")])
    before = state(bench)
    with pytest.raises(AddError, match="--replace"):
        add_domain(bench.project, "code", [lines(tmp_path / "two.jsonl", 1)])
    (tmp_path / "bad.txt").write_text("too little")
    with pytest.raises(Exception, match="window"):
        add_domain(bench.project, "code", [tmp_path / "bad.txt"], replace=True)
    assert state(bench) == before
    add_domain(bench.project, "code", [lines(tmp_path / "two.jsonl", 1)], replace=True)
    assert [path.name for path in (bench.workspace.data / "code").iterdir()] == ["two.jsonl"]


def test_when_git_refuses_everything_is_as_before(bench, tmp_path):
    add_domain(bench.project, "code", [lines(tmp_path / "one.jsonl")])
    before = state(bench)
    hook = bench.root / ".git" / "hooks" / "pre-commit"
    hook.write_text("#!/bin/sh\nexit 1\n")
    hook.chmod(0o755)
    with pytest.raises(Exception, match="git"):
        add_domain(bench.project, "code", [lines(tmp_path / "two.jsonl", 1)], replace=True)
    hook.unlink()
    assert state(bench)[:3] == before[:3]


def test_data_that_git_keeps_itself_is_refused_with_the_remedy(bench):
    bench.write("code", 0)
    git(bench.root, "add", "data/code")
    git(bench.root, "commit", "-q", "-m", "raw")
    with pytest.raises(AddError, match="git rm -r --cached data/code"):
        add_domain(bench.project, "code", [bench.workspace.data / "code"])


def test_text_of_another_domain_is_told(bench, tmp_path):
    add_domain(bench.project, "code", [lines(tmp_path / "one.jsonl")])
    from support.toys import step

    step(bench, "code")
    mixed = tmp_path / "mixed.jsonl"
    fresh = [{"id": f"n{n}", "text": text(5, n)} for n in range(60)]
    shifted = [{"id": f"again-{row['id']}", "text": row["text"]} for row in rows(0)[:8]]
    mixed.write_text("".join(f"{json.dumps(row)}\n" for row in (*fresh, *shifted)))
    assert add_domain(bench.project, "mixed", [mixed]).left_out > 0
