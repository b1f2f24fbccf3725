from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from flows.data.commits import resolve_commit
from flows.data.dataset import DatasetError, DatasetVersion, MissingDataError
from flows.data.dvc import add_and_commit, init_repository
from flows.data.fetch import fetch
from flows.data.versions import dataset_version, dataset_versions
from support.terminals import on_terminal

A, B, C = ("a" * 32 + ".dir", "b" * 32 + ".dir", "c" * 32 + ".dir")


@pytest.fixture(autouse=True)
def _on_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither git nor DVC reads or writes anything of this machine's user."""
    config = tmp_path_factory.mktemp("config")
    (config / "config").write_text(f"[core]\n    site_cache_dir = {config / 'site'}\n")
    monkeypatch.setenv("DVC_GLOBAL_CONFIG_DIR", str(config))
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    monkeypatch.delenv("DVC_SITE_CACHE_DIR", raising=False)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.delenv(f"GIT_{role}_NAME", raising=False)
        monkeypatch.delenv(f"GIT_{role}_EMAIL", raising=False)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "workspace"
    init_repository(root)
    return root


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "fetched"


def git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), "-c", "user.name=test", "-c", "user.email=test@localhost", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def commit(root: Path, message: str = "a commit") -> str:
    git(root, "add", "--all")
    git(root, "commit", "--allow-empty", "-m", message)
    return git(root, "rev-parse", "HEAD")


def write(root: Path, domain: str, **files: str) -> None:
    folder = root / "data" / domain
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / f"{name}.txt").write_text(text)


def point(root: Path, domain: str, md5: str, note: str = "") -> None:
    """A pointer without data: enough for all that only reads history."""
    file = root / "data" / f"{domain}.dvc"
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"outs:\n- md5: {md5}\n  hash: md5\n  path: {domain}\n{note}")


def locked(**md5s: str) -> str:
    """A dvc.lock that has the md5 of each domain; an empty one: its stage never ran."""
    outs = {name: [{"path": f"data/{name}", "hash": "md5", "md5": md5}] for name, md5 in md5s.items() if md5}
    return json.dumps({"schema": "2.0", "stages": {name: {"cmd": "true", "outs": outs[name]} for name in outs}})


def lock(root: Path, **md5s: str) -> None:
    """A pipeline with a stage for each domain, and what it made."""
    stages = {name: {"cmd": "true", "outs": [f"data/{name}"]} for name in md5s}
    (root / "dvc.yaml").write_text(json.dumps({"stages": stages}))
    (root / "dvc.lock").write_text(locked(**md5s))


def found(root: Path, rev: str = "HEAD") -> list[tuple[str, str, str]]:
    return [(version.domain, version.md5, version.git_rev) for version in dataset_versions(root, rev)]


def texts(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def objects(root: Path) -> Path:
    return root / ".dvc" / "cache" / "files" / "md5"


# --- a repository


def test_init_is_idempotent_and_keeps_what_is_there(tmp_path: Path) -> None:
    root = tmp_path / "new" / "workspace"
    root.mkdir(parents=True)
    (root / ".gitignore").write_text("mine")
    init_repository(root)
    before = {path: path.read_bytes() for path in (root / ".gitignore", root / ".dvc" / "config")}
    assert before[root / ".gitignore"] == b"mine\n.copal/\n"
    assert b"analytics = False" in before[root / ".dvc" / "config"]
    assert git(root, "symbolic-ref", "HEAD") == "refs/heads/main"
    with pytest.raises(subprocess.CalledProcessError):
        git(root, "rev-parse", "HEAD")  # commits nothing
    init_repository(root)
    assert {path: path.read_bytes() for path in before} == before
    assert set(git(root, "diff", "--cached", "--name-only").split()) == {
        ".gitignore",
        ".dvcignore",
        ".dvc/config",
        ".dvc/.gitignore",
    }


def test_add_and_commit_makes_a_version(root: Path) -> None:
    write(root, "legal", one="the law")
    sha = add_and_commit(root, "legal", "legal: first version")
    assert git(root, "log", "-1", "--format=%H %an <%ae> %s") == f"{sha} copal <copal@localhost> legal: first version"
    assert git(root, "status", "--porcelain") == ""
    assert ".dvc/config" in git(root, "ls-files").splitlines()
    (version,) = dataset_versions(root)
    listing = json.dumps([{"md5": hashlib.md5(b"the law").hexdigest(), "relpath": "one.txt"}])
    assert version == DatasetVersion(
        domain="legal",
        path="data/legal",
        md5=hashlib.md5(listing.encode()).hexdigest() + ".dir",
        git_rev=sha,
        repository=str(root),
    )
    assert add_and_commit(root, "legal", "nothing new") == sha


def test_add_and_commit_signs_as_the_user_of_the_repository(root: Path) -> None:
    git(root, "config", "user.name", "Ada")
    git(root, "config", "user.email", "ada@example.org")
    write(root, "legal", one="the law")
    add_and_commit(root, "legal", "legal")
    assert git(root, "log", "-1", "--format=%an <%ae>") == "Ada <ada@example.org>"


def test_adding_a_folder_that_is_not_there_is_one_line(root: Path) -> None:
    with pytest.raises(DatasetError, match="data/legal") as caught:
        add_and_commit(root, "legal", "legal")
    assert "\n" not in str(caught.value)


def test_repository_is_the_origin_without_its_secrets(root: Path) -> None:
    point(root, "legal", A)
    commit(root)
    assert dataset_versions(root)[0].repository == str(root)
    git(root, "remote", "add", "origin", "x")
    for url, public in (
        ("https://ada:secret@example.org:8443/data.git", "https://example.org:8443/data.git"),
        ("https://token@example.org/data.git", "https://example.org/data.git"),
        ("ssh://git:secret@example.org/data.git", "ssh://git@example.org/data.git"),
        ("git@example.org:data.git", "git@example.org:data.git"),
        ("/srv/data.git", "/srv/data.git"),
    ):
        git(root, "remote", "set-url", "origin", url)
        assert dataset_versions(root)[0].repository == public


# --- which versions there are, and in which order


def test_no_commit_no_versions(root: Path) -> None:
    point(root, "legal", A)
    assert dataset_versions(root) == []
    with pytest.raises(DatasetError, match="'main'"):
        dataset_versions(root, "main")
    commit(root)
    assert len(dataset_versions(root)) == 1


def test_versions_come_in_the_order_in_which_their_pointers_changed(root: Path) -> None:
    point(root, "zoology", A)
    first = commit(root)
    point(root, "legal", A)
    point(root, "code", A)
    second = commit(root)
    assert found(root) == [("zoology", A, first), ("code", A, second), ("legal", A, second)]
    point(root, "zoology", B)
    third = commit(root)
    commit(root, "something else")
    assert found(root) == [("code", A, second), ("legal", A, second), ("zoology", B, third)]
    assert found(root, first) == [("zoology", A, first)]
    assert found(root, "HEAD~2")[0] == ("zoology", A, first)


def test_an_md5_that_comes_back_changed_when_it_came_back(root: Path) -> None:
    point(root, "legal", A)
    commit(root)
    point(root, "legal", B)
    commit(root)
    point(root, "code", C)
    code = commit(root)
    point(root, "legal", A)
    again = commit(root)
    assert found(root) == [("code", C, code), ("legal", A, again)]


def test_a_commit_that_keeps_the_md5_does_not_count(root: Path) -> None:
    point(root, "legal", A)
    first = commit(root)
    point(root, "code", A)
    code = commit(root)
    point(root, "legal", A, note="desc: the law, as of today\n")
    commit(root)
    assert found(root) == [("legal", A, first), ("code", A, code)]


def test_a_pointer_that_is_gone_is_gone_and_may_come_back(root: Path) -> None:
    point(root, "legal", A)
    first = commit(root)
    (root / "data" / "legal.dvc").unlink()
    commit(root)
    assert found(root) == []
    point(root, "legal", A)
    assert found(root) == []  # not committed
    assert found(root, "HEAD~1") == [("legal", A, first)]
    back = commit(root)
    assert found(root) == [("legal", A, back)]


def test_a_merge_keeps_the_commit_of_the_side_that_changed_the_pointer(root: Path) -> None:
    point(root, "legal", A)
    point(root, "code", A)
    commit(root)
    git(root, "switch", "-c", "side")
    point(root, "legal", B)
    side = commit(root)
    git(root, "switch", "main")
    point(root, "code", B)
    main = commit(root)
    git(root, "merge", "--no-ff", "side")
    merge = git(root, "rev-parse", "HEAD")
    assert merge not in (side, main)
    assert sorted(found(root)) == [("code", B, main), ("legal", B, side)]


def test_a_merge_that_settles_on_a_third_md5_is_the_change(root: Path) -> None:
    point(root, "legal", A)
    commit(root)
    git(root, "switch", "-c", "side")
    point(root, "legal", B)
    commit(root)
    git(root, "switch", "main")
    point(root, "legal", C)
    commit(root)
    git(root, "merge", "--no-commit", "-s", "ours", "side")
    point(root, "legal", "d" * 32 + ".dir")
    merge = commit(root)
    assert found(root) == [("legal", "d" * 32 + ".dir", merge)]


def test_the_outputs_of_a_lock_file_change_one_by_one(root: Path) -> None:
    lock(root, legal=A, code="")
    first = commit(root)
    assert found(root) == [("legal", A, first)]  # the stage that makes `code` never ran
    lock(root, legal=A, code=A)
    second = commit(root)
    lock(root, legal=B, code=A)
    third = commit(root)
    assert found(root) == [("code", A, second), ("legal", B, third)]


def test_a_merge_of_two_lock_files_changes_neither_output(root: Path) -> None:
    lock(root, legal=A, code=A)
    commit(root)
    git(root, "switch", "-c", "side")
    lock(root, legal=B, code=A)
    side = commit(root)
    git(root, "switch", "main")
    lock(root, legal=A, code=B)
    main = commit(root)
    git(root, "merge", "--no-commit", "-s", "ours", "side")
    lock(root, legal=B, code=B)
    commit(root)
    assert sorted(found(root)) == [("code", B, main), ("legal", B, side)]


@pytest.mark.parametrize(
    "content", ["<<<<<<< HEAD\n", "outs: 3\n", "- 1\n", "outs: [1]\n", "\ttab", "stages: {a: 1, b: {outs: {}}}", "\0"]
)
def test_a_broken_pointer_in_an_old_commit_is_passed_over(root: Path, content: str) -> None:
    (root / "data").mkdir()
    (root / "data" / "legal.dvc").write_text(content)
    commit(root)
    point(root, "legal", A)
    mended = commit(root)
    assert found(root) == [("legal", A, mended)]


def test_many_commits_cost_little(root: Path) -> None:
    # 1,000 changes of dvc.lock as git imports them; one of them, in the middle, to `legal`.
    lock(root, legal=A, code=A)
    commit(root)
    stream = []
    for number in range(1000):
        md5 = f"{number:032x}.dir"
        content = locked(legal=B if number >= 500 else A, code=md5)
        parent = "from refs/heads/main^0\n" if number == 0 else ""
        stream.append(
            f"commit refs/heads/main\ncommitter t <t@t> {number} +0000\ndata 1\nx\n{parent}"
            f"M 644 inline dvc.lock\ndata {len(content)}\n{content}\n"
        )
    subprocess.run(["git", "-C", str(root), "fast-import", "--quiet"], input="".join(stream).encode(), check=True)
    legal, code = git(root, "rev-parse", "HEAD~499", "HEAD").split()
    assert found(root) == [("legal", B, legal), ("code", md5, code)]


def test_only_folders_directly_under_data_are_domains(root: Path) -> None:
    point(root, "legal", A)
    (root / "data" / "table.jsonl.dvc").write_text(f"outs:\n- md5: {'a' * 32}\n  hash: md5\n  path: table.jsonl\n")
    (root / "data" / "inside").mkdir()
    (root / "data" / "inside" / "deep.dvc").write_text(f"outs:\n- md5: {A}\n  hash: md5\n  path: deep\n")
    (root / "models.dvc").write_text(f"outs:\n- md5: {A}\n  hash: md5\n  path: models\n")
    (root / ":(elsewhere).dvc").write_text(f"wdir: data\nouts:\n- md5: {A}\n  hash: md5\n  path: medical\n")
    sha = commit(root)
    assert found(root) == [("legal", A, sha), ("medical", A, sha)]


def test_names_that_no_domain_may_have_are_returned_as_they_are(root: Path) -> None:
    names = ["-rf", "Legal Texts", "[ab]*", "recht§", "x'y\"z", ":(glob)x"]
    (root / "data").mkdir()
    for name in names:
        pointer = {"outs": [{"md5": A, "hash": "md5", "path": name}]}
        (root / "data" / f"{name}.dvc").write_text(json.dumps(pointer))
    sha = commit(root)
    assert found(root) == [(name, A, sha) for name in sorted(names)]
    pointer = {"outs": [{"md5": A, "hash": "md5", "path": "line\nbreak"}]}
    (root / "data" / "line\nbreak.dvc").write_text(json.dumps(pointer))
    assert ("linebreak", A, commit(root)) in found(root)  # what DVC makes of it


def test_a_path_with_two_owners_is_one_line(root: Path) -> None:
    lock(root, legal=A)
    point(root, "legal", A)
    commit(root)
    with pytest.raises(DatasetError, match="data/legal") as caught:
        dataset_versions(root)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["outs: [", "outs: 3\n", "<<<<<<< HEAD\n", "outs:\n- wrong: 1\n", b"\xff\xfe"])
def test_a_pointer_that_dvc_cannot_read_is_one_line(root: Path, content: str | bytes) -> None:
    (root / "data").mkdir()
    (root / "data" / "legal.dvc").write_bytes(content if isinstance(content, bytes) else content.encode())
    commit(root)
    with pytest.raises(DatasetError, match=r"legal\.dvc") as caught:
        dataset_versions(root)
    assert "\n" not in str(caught.value)


def test_one_domain_at_a_revision(root: Path) -> None:
    point(root, "legal", A)
    first = commit(root)
    git(root, "tag", "v1")
    point(root, "legal", B)
    point(root, "code", C)
    second = commit(root)
    assert dataset_version(root, "legal", "HEAD").md5 == B
    assert dataset_version(root, "legal", "v1").md5 == A
    assert dataset_version(root, "legal", first[:10]).git_rev == first
    assert resolve_commit(root, "main") == second
    with pytest.raises(DatasetError, match=r"data/code at v1 .* it tracks legal$"):
        dataset_version(root, "code", "v1")
    for rev in ("v2", "", "--help", "-1", "HEAD:data", "0" * 40):
        with pytest.raises(DatasetError, match="is not a commit, branch or tag") as caught:
            dataset_version(root, "legal", rev)
        assert "\n" not in str(caught.value)


def test_what_is_no_repository_says_so(tmp_path: Path, root: Path) -> None:
    (root / "inside").mkdir()
    (tmp_path / "plain").mkdir()
    for folder, reason in (
        (tmp_path / "nowhere", "is not a folder"),
        (tmp_path / "plain", "not a git repository"),
        (root / "inside", "not its root"),
    ):
        for ask in (dataset_versions, lambda repo: resolve_commit(repo, "HEAD")):
            with pytest.raises(DatasetError, match=reason) as caught:
                ask(folder)
            assert "\n" not in str(caught.value)


def test_a_git_hook_does_not_lead_astray(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point(root, "legal", A)
    sha = commit(root)
    other = tmp_path / "other"
    init_repository(other)
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other / ".git" / "index"))
    assert found(root) == [("legal", A, sha)]


# --- the data


def test_fetch_gives_the_data_of_an_older_revision_and_leaves_the_work_tree_alone(root: Path, cache: Path) -> None:
    write(root, "legal", one="first", two="second")
    add_and_commit(root, "legal", "legal")
    write(root, "legal", one="changed")
    add_and_commit(root, "legal", "legal again")
    write(root, "legal", one="dirty", mine="not committed")
    (root / "data" / "legal.dvc").write_text("dirty")
    (root / "dvc.yaml").write_text("dirty: [")
    before = texts(root / "data"), git(root, "status", "--porcelain")

    old, new = dataset_version(root, "legal", "HEAD~1"), dataset_version(root, "legal", "HEAD")
    assert texts(fetch(root, old, cache)) == {"one.txt": "first", "two.txt": "second"}
    assert fetch(root, new, cache) == cache / new.md5
    assert texts(cache / new.md5) == {"one.txt": "changed"}
    assert (texts(root / "data"), git(root, "status", "--porcelain")) == before
    assert {path.name for path in cache.iterdir() if not path.name.endswith(".lock")} == {old.md5, new.md5}


def test_folders_in_folders_empty_files_and_strange_names(root: Path, cache: Path) -> None:
    folder = root / "data" / "code"
    for name in ("a/b/c.py", "a/d e.py", "ünï.py", "empty.py", "[x]*.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("" if name == "empty.py" else name)
    (folder / "crlf.txt").write_bytes(b"one\r\ntwo\r\n")
    add_and_commit(root, "code", "code")
    fetched = fetch(root, dataset_version(root, "code"), cache)
    assert {str(path.relative_to(fetched)): path.read_bytes() for path in fetched.rglob("*") if path.is_file()} == {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_a_folder_without_files_is_fetched_as_one(root: Path, cache: Path) -> None:
    (root / "data" / "void").mkdir(parents=True)
    add_and_commit(root, "void", "void")
    fetched = fetch(root, dataset_version(root, "void"), cache)
    assert fetched.is_dir()
    assert texts(fetched) == {}


def test_a_whole_copy_is_used_again(root: Path, cache: Path) -> None:
    write(root, "legal", one="the law")
    add_and_commit(root, "legal", "legal")
    version = dataset_version(root, "legal")
    first = fetch(root, version, cache)
    shutil.rmtree(root)
    assert fetch(root, version, cache) == first


def test_what_a_killed_fetch_left_is_discarded(root: Path, cache: Path) -> None:
    write(root, "legal", one="the law")
    add_and_commit(root, "legal", "legal")
    version = dataset_version(root, "legal")
    left = cache / f".{version.md5}.partial" / "files"
    left.mkdir(parents=True)
    (left / "half.txt").write_text("ha")
    assert texts(fetch(root, version, cache)) == {"one.txt": "the law"}
    assert not left.parent.exists()


def test_the_copy_is_no_link_into_the_cache_of_dvc(root: Path, cache: Path) -> None:
    (root / ".dvc" / "config").write_text('[cache]\n    type = "hardlink,symlink"\n')
    commit(root)
    write(root, "legal", one="the law")
    add_and_commit(root, "legal", "legal")
    fetched = fetch(root, dataset_version(root, "legal"), cache)
    assert not (fetched / "one.txt").is_symlink()
    assert (fetched / "one.txt").stat().st_nlink == 1


def _fetch_and_report(root: Path, version: DatasetVersion, cache: Path, results: multiprocessing.Queue[str]) -> None:
    results.put(str(fetch(root, version, cache)))


def test_processes_that_fetch_one_version_at_once_all_get_it(root: Path, cache: Path) -> None:
    write(root, "legal", **{f"n{number}": str(number) for number in range(50)})
    add_and_commit(root, "legal", "legal")
    version = dataset_version(root, "legal")
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[str] = context.Queue()
    arguments = (root, version, cache, results)
    processes = [context.Process(target=_fetch_and_report, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    assert {results.get(timeout=120) for _ in processes} == {str(cache / version.md5)}
    for process in processes:
        process.join()
    assert len(texts(cache / version.md5)) == 50


def test_a_fresh_clone_fetches_from_the_remote(root: Path, cache: Path, tmp_path: Path) -> None:
    from dvc.repo import Repo

    write(root, "legal", one="the law", two="the other law")
    add_and_commit(root, "legal", "before there was a remote")
    (root / ".dvc" / "config").write_text("[core]\n    remote = store\n['remote \"store\"']\n    url = ../../store\n")
    commit(root)
    with Repo(str(root)) as dvc:
        dvc.push()
    shutil.rmtree(root / ".dvc" / "cache")
    clone = tmp_path / "clone"
    git(tmp_path, "clone", str(root), str(clone))
    version = dataset_version(clone, "legal")
    assert version.repository == str(root)
    assert texts(fetch(clone, version, cache)) == {"one.txt": "the law", "two.txt": "the other law"}
    assert not (clone / "data" / "legal").exists()
    assert not (clone / ".dvc" / "cache" / "files").exists()


def test_the_output_of_a_stage_is_a_version_and_is_fetched(
    root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dvc.repo import Repo

    monkeypatch.chdir(root)  # `dvc repro` looks there for dvc.yaml

    command = "mkdir -p data/code && cp source.txt data/code/copy.txt"
    stage = {"cmd": command, "deps": ["source.txt"], "outs": ["data/code"]}
    (root / "dvc.yaml").write_text(json.dumps({"stages": {"build": stage}}))
    (root / "source.txt").write_text("print(1)")
    commit(root)
    assert found(root) == []
    with Repo(str(root)) as dvc:
        dvc.reproduce()
    first = commit(root)
    (root / "source.txt").write_text("print(2)")
    with Repo(str(root)) as dvc:
        dvc.reproduce()
    second = commit(root)
    assert [version.git_rev for version in dataset_versions(root)] == [second]
    assert texts(fetch(root, dataset_version(root, "code", first), cache)) == {"copy.txt": "print(1)"}
    assert texts(fetch(root, dataset_version(root, "code"), cache)) == {"copy.txt": "print(2)"}


def test_an_output_that_git_keeps_is_fetched_from_git(root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dvc.repo import Repo

    monkeypatch.chdir(root)

    command = "mkdir -p data/code && echo 1 > data/code/one.txt"
    stage = {"cmd": command, "outs": [{"data/code": {"cache": False}}]}
    (root / "dvc.yaml").write_text(json.dumps({"stages": {"build": stage}}))
    with Repo(str(root)) as dvc:
        dvc.reproduce()
    commit(root)
    assert texts(fetch(root, dataset_version(root, "code"), cache)) == {"one.txt": "1\n"}


def test_a_pointer_of_dvc_2_hashes_text_with_unix_line_ends(root: Path, cache: Path) -> None:
    def store(content: bytes, hashed: bytes, suffix: str = "") -> str:
        md5 = hashlib.md5(hashed).hexdigest() + suffix
        (root / ".dvc" / "cache" / md5[:2]).mkdir(parents=True)
        (root / ".dvc" / "cache" / md5[:2] / md5[2:]).write_bytes(content)
        return md5

    listing = json.dumps([{"md5": store(b"a\r\nb\r\n", b"a\nb\n"), "relpath": "one.txt"}]).encode()
    md5 = store(listing, listing, ".dir")
    (root / "data").mkdir()
    (root / "data" / "legal.dvc").write_text(f"outs:\n- md5: {md5}\n  path: legal\n")
    sha = commit(root)
    assert found(root) == [("legal", md5, sha)]
    assert (fetch(root, dataset_version(root, "legal"), cache) / "one.txt").read_bytes() == b"a\r\nb\r\n"


def test_a_pointer_that_was_committed_before_dvc_was_can_be_read(root: Path, cache: Path) -> None:
    write(root, "legal", one="the law")
    git(root, "reset")
    from dvc.repo import Repo

    with Repo(str(root)) as dvc:
        dvc.add(str(root / "data" / "legal"))
    git(root, "add", "data")
    git(root, "commit", "-m", "no .dvc in it")
    assert texts(fetch(root, dataset_version(root, "legal"), cache)) == {"one.txt": "the law"}


@pytest.mark.parametrize("remote", [False, True])
def test_data_that_is_nowhere_is_one_line(root: Path, cache: Path, tmp_path: Path, remote: bool) -> None:
    if remote:
        (tmp_path / "store").mkdir()
        (root / ".dvc" / "config").write_text(f"[core]\n    remote = s\n['remote \"s\"']\n    url = {tmp_path}/store\n")
    write(root, "legal", one="the law", two="the other law")
    add_and_commit(root, "legal", "never pushed")
    version = dataset_version(root, "legal")
    one = hashlib.md5(b"the law").hexdigest()
    (objects(root) / one[:2] / one[2:]).unlink()
    for _ in ("one file is missing", "all is missing"):
        with pytest.raises(MissingDataError, match=r"data/legal .*dvc push") as caught:
            fetch(root, version, cache)
        assert version.md5 in str(caught.value)
        assert "\n" not in str(caught.value)
        shutil.rmtree(root / ".dvc" / "cache", ignore_errors=True)
    assert [path for path in cache.iterdir() if not path.name.endswith(".lock")] == []


def test_a_remote_that_does_not_answer_is_one_line(root: Path, cache: Path) -> None:
    url = "http://127.0.0.1:9/store"
    (root / ".dvc" / "config").write_text(f"[core]\n    remote = s\n['remote \"s\"']\n    url = {url}\n")
    point(root, "legal", A)
    commit(root)
    with pytest.raises(DatasetError, match="data/legal") as caught:
        fetch(root, dataset_version(root, "legal"), cache)
    assert "\n" not in str(caught.value)


def test_a_place_that_cannot_be_written_is_named(root: Path, tmp_path: Path) -> None:
    point(root, "legal", A)
    commit(root)
    (tmp_path / "file").touch()
    with pytest.raises(DatasetError, match=str(tmp_path / "file")):
        fetch(root, dataset_version(root, "legal"), tmp_path / "file" / "cache")


def test_a_damaged_file_in_the_cache_of_dvc_is_named(root: Path, cache: Path) -> None:
    write(root, "legal", one="the law", two="the other law")
    add_and_commit(root, "legal", "legal")
    version = dataset_version(root, "legal")
    md5 = hashlib.md5(b"the other law").hexdigest()
    stored = objects(root) / md5[:2] / md5[2:]
    stored.chmod(0o644)
    stored.write_text("the other lie")
    with pytest.raises(DatasetError, match=r"data/legal/two\.txt at commit .* is damaged") as caught:
        fetch(root, version, cache)
    assert not isinstance(caught.value, MissingDataError)
    assert "\n" not in str(caught.value)
    assert not (cache / version.md5).exists()
    stored.write_text("the other law")
    assert texts(fetch(root, version, cache))["two.txt"] == "the other law"


def _listing(root: Path, version: DatasetVersion) -> Path:
    stored = objects(root) / version.md5[:2] / version.md5[2:]
    stored.chmod(0o644)
    return stored


def test_a_damaged_listing_is_found_and_not_remembered(root: Path, cache: Path) -> None:
    write(root, "legal", one="the law", two="the other law")
    add_and_commit(root, "legal", "legal")
    version = dataset_version(root, "legal")
    listing = _listing(root, version)
    good = listing.read_text()
    for damaged in (json.dumps(json.loads(good)[:1]), good[:-10], "{}", ""):
        listing.write_text(damaged)
        with pytest.raises(DatasetError, match="data/legal at commit") as caught:
            fetch(root, version, cache)
        assert "\n" not in str(caught.value)
    listing.write_text(good)
    assert len(texts(fetch(root, version, cache))) == 2


@pytest.mark.parametrize("name", ["../escaped.txt", "a/../../../escaped.txt", "/escaped.txt"])
def test_a_listing_cannot_write_outside_its_folder(root: Path, cache: Path, name: str) -> None:
    write(root, "legal", one="the law")
    add_and_commit(root, "legal", "legal")
    version = dataset_version(root, "legal")
    listing = _listing(root, version)
    listing.write_text(json.dumps([{"md5": hashlib.md5(b"the law").hexdigest(), "relpath": name}]))
    with pytest.raises(DatasetError):
        fetch(root, version, cache)
    assert list(cache.parent.rglob("escaped.txt")) == []


def test_a_commit_that_the_repository_lacks_is_one_line(root: Path, cache: Path) -> None:
    point(root, "legal", A)
    commit(root)
    version = replace(dataset_version(root, "legal"), git_rev="1" * 40)
    with pytest.raises(DatasetError, match="data/legal at commit 1111111111") as caught:
        fetch(root, version, cache)
    assert "\n" not in str(caught.value)


def test_an_md5_that_is_none_cannot_name_a_folder(root: Path, cache: Path) -> None:
    point(root, "legal", "../../../x.dir")
    commit(root)
    with pytest.raises(DatasetError, match="is not the md5 of a folder"):
        fetch(root, dataset_version(root, "legal"), cache)
    assert not cache.exists()


# --- the terminal


def test_dvc_says_nothing_on_a_terminal(root: Path, tmp_path: Path) -> None:
    write(root, "legal", one="the law")
    code = (
        "from pathlib import Path\n"
        "from flows.data.dvc import add_and_commit, init_repository\n"
        "from flows.data.fetch import fetch\n"
        "from flows.data.versions import dataset_version\n"
        f"root = Path({str(root)!r}); init_repository(root); add_and_commit(root, 'legal', 'legal')\n"
        f"fetch(root, dataset_version(root, 'legal'), Path({str(tmp_path / 'fetched')!r}))\n"
    )
    status, said = on_terminal([sys.executable, "-c", code], os.environ)
    assert (status, said.replace("\x1b[0m", "")) == (0, "")  # colorama, which DVC starts, resets the colours at exit
    assert logging.getLogger("dvc").getEffectiveLevel() >= logging.CRITICAL
