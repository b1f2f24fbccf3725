"""`copal add`: a user's files become a domain whole, or nothing is changed."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
import signal
from pathlib import Path

import pytest

from copal.errors import DataError
from flows.cli.doctor import doctor
from flows.data.dvc import add_and_commit
from flows.data.git import git
from flows.pending.plan import plan
from flows.start.add import AddError, add_domain
from flows.workspace import open_workspace
from support.benches import Bench, copy_workspace, text
from support.crashes import Point, start_add
from support.tasks import write_task

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
    (bench.workspace.data / "loose.txt").write_text("a file of its own\n")
    (check,) = [check for check in doctor(bench.root) if check.name == "other data"]
    assert check.found.startswith("data/loose.txt, data/raw: no domain")
    assert "copal add DOMAIN data/loose.txt" in check.advice


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
    write_task(tmp_path / "in")
    add_domain(bench.project, "code", [tmp_path / "in"])
    names = sorted(path.name for path in (bench.workspace.data / "code").rglob("*.*"))
    assert names == ["dialect.yaml", "one.jsonl", "questions.jsonl"]
    add_domain(bench.project, "law", [tmp_path / "in", lines(tmp_path / "two.jsonl", 1)])
    names = sorted(
        path.relative_to(bench.workspace.data).as_posix() for path in (bench.workspace.data / "law").rglob("*.*")
    )
    assert names == ["law/in/deep/one.jsonl", "law/two.jsonl"]


def test_a_task_that_no_step_would_ask_is_refused(bench, tmp_path):
    (tmp_path / "in").mkdir()
    lines(tmp_path / "in" / "one.jsonl")
    write_task(tmp_path / "in", "task: !function utils.task\n")
    before = state(bench)
    with pytest.raises(DataError, match=r"data/code/tasks/dialect\.yaml, line 1: '!function'"):
        add_domain(bench.project, "code", [tmp_path / "in"])
    assert state(bench) == before


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


def of(bench: Bench, domain: str = "code") -> list[str]:
    return sorted(path.name for path in (bench.workspace.data / domain).iterdir())


def said_by_doctor(bench: Bench) -> str:
    return next(check.found for check in doctor(bench.root) if check.name == "domains")


@pytest.fixture
def replaced(bench, tmp_path) -> tuple[Bench, Path]:
    """A workspace whose domain `code` has one.jsonl, and what is to take its place, two.jsonl."""
    add_domain(bench.project, "code", [lines(tmp_path / "one.jsonl")])
    return bench, lines(tmp_path / "two.jsonl", 1)


def test_data_that_a_killed_add_moved_away_is_told_of_and_the_next_add_brings_it_back(replaced, tmp_path):
    bench, path = replaced
    before = state(bench)
    killed = start_add(bench.root, "code", path, Point("pathlib:Path.rename", "after", of=".before"))
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert not (bench.workspace.data / "code").exists()
    assert "killed has moved older data: of data/code to" in said_by_doctor(bench)
    with pytest.raises(DataError, match="is not there"):
        add_domain(bench.project, "law", [tmp_path / "missing.jsonl"])
    assert state(bench) == before
    assert said_by_doctor(bench) == "none is refused"
    assert add_domain(bench.project, "law", [path]).brought_back == ()


def killed_with_new_data_in_place(bench: Bench, path: Path, image: Path, monkeypatch) -> Bench:
    """What a kill before the commit leaves: a copy, made at that moment."""
    with monkeypatch.context() as patch:

        def commit(*arguments: object) -> str:
            copy_workspace(bench.root, image)
            return add_and_commit(*arguments)

        patch.setattr("flows.start.add.add_and_commit", commit)
        add_domain(bench.project, "code", [path], replace=True)
    return Bench(open_workspace(image), bench.base)


def test_older_data_stays_until_the_new_data_of_a_killed_add_is_committed_or_deleted(replaced, tmp_path, monkeypatch):
    bench, path = replaced
    old = state(bench)
    left = killed_with_new_data_in_place(bench, path, tmp_path / "left", monkeypatch)
    add_domain(left.project, "law", [path])
    assert of(left) == ["two.jsonl"]
    assert "killed has moved older data: of data/code to" in said_by_doctor(left)

    copy_workspace(left.root, tmp_path / "back")
    back = Bench(open_workspace(tmp_path / "back"), bench.base)
    shutil.rmtree(back.workspace.data / "code")
    assert add_domain(back.project, "code", [back.workspace.data / "code"]).brought_back == ("code",)
    assert of(back) == ["one.jsonl"]

    add_domain(left.project, "code", [left.workspace.data / "code"])
    assert of(left) == ["two.jsonl"]
    assert said_by_doctor(left) == said_by_doctor(back) == "none is refused"
    for one in (left, back):
        assert git(one.root, "status", "--porcelain") == old[3]
        assert not list(one.workspace.private.glob("add-*"))


def test_what_cannot_be_moved_back_is_kept_and_the_next_add_moves_it_back(replaced, tmp_path, monkeypatch):
    bench, path = replaced
    rename, target = Path.rename, bench.workspace.data / "code"

    def refused(self: Path, to: Path) -> Path:
        if to == target:
            raise PermissionError(f"{to} cannot be made")
        return rename(self, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refused)
        with pytest.raises(PermissionError):
            add_domain(bench.project, "code", [path], replace=True)
    assert not target.exists()
    assert add_domain(bench.project, "law", [path]).brought_back == ("code",)
    assert of(bench) == ["one.jsonl"]


@pytest.mark.parametrize("domain", ["before", "a-b_c-12345678"])
def test_data_is_replaced_whatever_the_domain_is_called(bench, tmp_path, domain):
    add_domain(bench.project, domain, [lines(tmp_path / "one.jsonl")])
    add_domain(bench.project, domain, [lines(tmp_path / "two.jsonl", 1)], replace=True)
    assert of(bench, domain) == ["two.jsonl"]


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
