"""Data in another git repository: where it is read, and what is kept of it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flows.cache import Cache
from flows.data.commits import in_history
from flows.data.dataset import DatasetError, DatasetVersion
from flows.data.dvc import add_and_commit, init_repository
from flows.data.fetch import fetch_version
from flows.data.git import login_environment
from flows.data.repositories import data_root
from flows.data.versions import dataset_version, dataset_versions
from flows.settings import WatchSettings
from flows.workspace import Workspace
from support.git_server import git_server


@pytest.fixture(autouse=True)
def _on_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither git nor DVC reads or writes anything of this machine's user."""
    config = tmp_path_factory.mktemp("config")
    (config / "config").write_text(f"[core]\n    site_cache_dir = {config / 'site'}\n")
    monkeypatch.setenv("DVC_GLOBAL_CONFIG_DIR", str(config))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A repository with a DVC remote and, at its only commit, the domain legal, pushed."""
    root = tmp_path / "other"
    init_repository(root)
    config = f"[core]\n    remote = store\n['remote \"store\"']\n    url = {tmp_path / 'store'}\n"
    (root / ".dvc" / "config").write_text(config)
    git(root, "add", ".dvc/config")
    put(root, "legal", "the law")
    return root


def git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), "-c", "user.name=test", "-c", "user.email=test@localhost", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def put(root: Path, domain: str, text: str, push: bool = True) -> str:
    """Commit a version of a domain, and push its data away from the repository's own cache."""
    from dvc.repo import Repo

    (root / "data" / domain).mkdir(parents=True, exist_ok=True)
    (root / "data" / domain / "text.txt").write_text(text)
    sha = add_and_commit(root, domain, f"{domain}: {text}")
    if push:
        with Repo(str(root)) as dvc:
            dvc.push()
        shutil.rmtree(root / ".dvc" / "cache")
    return sha


def url(repository: Path) -> WatchSettings:
    return WatchSettings(repository=f"file://{repository}")


def text(workspace: Workspace, watch: WatchSettings, version: DatasetVersion) -> str:
    return (fetch_version(Cache(workspace.cache), workspace, watch, version) / "text.txt").read_text()


def snapshot(root: Path) -> dict[str, bytes]:
    """Every file but DVC's scratch, with git's index, refs and configuration."""
    files = [path for path in root.rglob("*") if path.is_file()]
    named = {path.relative_to(root).as_posix(): path for path in files}
    return {name: path.read_bytes() for name, path in named.items() if not name.startswith(".dvc/tmp/")}


def test_the_workspace_is_the_repository_unless_another_is_named(workspace: Workspace) -> None:
    assert data_root(workspace, WatchSettings()) == workspace.root
    assert not workspace.private.exists()


@pytest.mark.parametrize("relative", [True, False])
def test_a_path_is_read_where_it_is_and_left_alone(workspace: Workspace, other: Path, relative: bool) -> None:
    put(other, "code", "print()", push=False)  # in that repository's own cache only
    (other / "data" / "legal" / "text.txt").write_text("an edit that nobody committed")
    (other / "new.txt").write_text("staged")
    git(other, "add", "new.txt")
    git(other, "status")  # brings the index up to date, as any git command may
    before = (snapshot(other), git(other, "status", "--porcelain"), git(other, "for-each-ref"))
    watch = WatchSettings(repository="../other" if relative else str(other))
    found = dataset_versions(data_root(workspace, watch))
    assert [version.domain for version in found] == ["legal", "code"]
    assert {version.repository for version in found} == {str(other)}
    assert [text(workspace, watch, version) for version in found] == ["the law", "print()"]
    assert (snapshot(other), git(other, "status", "--porcelain"), git(other, "for-each-ref")) == before


def test_a_path_that_leads_nowhere_is_one_line(workspace: Workspace) -> None:
    with pytest.raises(DatasetError, match="nowhere is not a folder"):
        dataset_versions(data_root(workspace, WatchSettings(repository="../nowhere")))


def test_a_url_is_cloned_and_its_data_comes_from_its_own_remote(workspace: Workspace, other: Path) -> None:
    first = git(other, "rev-parse", "HEAD")
    root = data_root(workspace, url(other))
    assert root.is_relative_to(workspace.cache / "repositories")
    version = dataset_version(root, "legal")
    assert (version.git_rev, version.repository) == (first, f"file://{other}")
    assert text(workspace, url(other), version) == "the law"
    assert [path.name for path in root.iterdir()] == [".git"]
    second = put(other, "legal", "the new law")
    assert dataset_version(data_root(workspace, url(other), first), "legal").git_rev == first  # it is there: no fetch
    assert dataset_version(data_root(workspace, url(other)), "legal").git_rev == second
    assert text(workspace, url(other), dataset_version(root, "legal")) == "the new law"
    assert git(workspace.root, "status", "--porcelain", "--", ".copal") == ""


def test_branches_and_tags_have_the_names_that_they_have_in_the_remote(workspace: Workspace, other: Path) -> None:
    first = git(other, "rev-parse", "HEAD")
    git(other, "tag", "v1")
    git(other, "checkout", "-q", "-b", "topic/new")
    topic = put(other, "code", "print()")
    git(other, "checkout", "-q", "main")
    root = data_root(workspace, url(other))
    assert [version.domain for version in dataset_versions(root)] == ["legal"]
    assert [version.domain for version in dataset_versions(root, "topic/new")] == ["legal", "code"]
    assert dataset_version(root, "legal", "v1").git_rev == first
    watch = WatchSettings(repository=f"file://{other}", branch="topic/new")
    assert git(data_root(workspace, watch), "rev-parse", "HEAD") == topic
    git(other, "branch", "-D", "topic/new")
    git(other, "branch", "topic")  # where a folder of branches was
    assert [version.domain for version in dataset_versions(data_root(workspace, url(other)), "topic")] == ["legal"]
    with pytest.raises(DatasetError, match=r"file://.*other has no branch 'topic/new'"):
        data_root(workspace, watch)


def test_the_default_branch_of_the_remote_is_followed(workspace: Workspace, other: Path) -> None:
    data_root(workspace, url(other))
    git(other, "checkout", "-q", "-b", "trunk")
    sha = put(other, "code", "print()")
    assert dataset_version(data_root(workspace, url(other)), "code").git_rev == sha
    git(other, "branch", "-D", "main")
    assert dataset_version(data_root(workspace, url(other)), "code").git_rev == sha


def test_todays_storage_serves_old_commits_of_a_clone(workspace: Workspace, other: Path, tmp_path: Path) -> None:
    old = dataset_version(other, "legal")
    (tmp_path / "store").rename(tmp_path / "moved")
    config = other / ".dvc" / "config"
    config.write_text(config.read_text().replace(str(tmp_path / "store"), str(tmp_path / "moved")))
    put(other, "legal", "the new law")
    git(other, "commit", "-q", "-m", "the storage moved", ".dvc/config")
    data_root(workspace, url(other))
    assert text(workspace, url(other), old) == "the law"


def test_a_history_that_was_rewritten_loses_nothing(workspace: Workspace, other: Path) -> None:
    old = dataset_version(data_root(workspace, url(other)), "legal")
    git(other, "checkout", "-q", "--orphan", "fresh")
    put(other, "legal", "other law")
    git(other, "branch", "-M", "fresh", "main")
    git(other, "reflog", "expire", "--expire=now", "--all")
    git(other, "gc", "-q", "--prune=now")
    root = data_root(workspace, url(other))
    git(root, "reflog", "expire", "--expire=now", "--all")
    for path in (root / ".git" / "objects").rglob("*"):
        os.utime(path, (1e9, 1e9))  # git spares what is young
    git(root, "gc", "-q")
    new = dataset_version(root, "legal")
    assert new.md5 != old.md5
    assert in_history(root, new.git_rev, "HEAD")
    assert not in_history(root, old.git_rev, "HEAD")
    assert not in_history(root, "0" * 40, "HEAD")
    assert text(workspace, url(other), old) == "the law"


def test_a_remote_that_is_away_is_one_line_and_may_come_back(workspace: Workspace, other: Path) -> None:
    away = other.with_name("away")
    other.rename(away)
    for _ in ("never cloned", "cloned"):
        with pytest.raises(DatasetError, match=rf"^cannot fetch file://{other}: ") as caught:
            data_root(workspace, url(other))
        assert "\n" not in str(caught.value)
        away.rename(other)
        assert [version.domain for version in dataset_versions(data_root(workspace, url(other)))] == ["legal"]
        other.rename(away)


@pytest.mark.parametrize("left", [".git", ".git/objects", ".git/HEAD"])
def test_a_clone_that_was_killed_is_completed(workspace: Workspace, other: Path, left: str) -> None:
    root = data_root(workspace, url(other))
    kept = root.with_name("kept")
    root.rename(kept)
    (root / left).parent.mkdir(parents=True)
    (shutil.copyfile if (kept / left).is_file() else shutil.copytree)(kept / left, root / left)
    (root / ".git" / "copal-clone").unlink(missing_ok=True)
    before = (workspace.root / ".git" / "config").read_text()
    assert data_root(workspace, url(other)) == root
    assert dataset_version(root, "legal") == dataset_version(kept, "legal")
    assert (workspace.root / ".git" / "config").read_text() == before


def test_several_checks_at_once_make_one_clone(workspace: Workspace, other: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        roots = list(pool.map(lambda _: data_root(workspace, url(other)), range(4)))
    assert len(set(roots)) == 1
    assert dataset_version(roots[0], "legal").git_rev == git(other, "rev-parse", "HEAD")


def test_a_password_is_used_and_never_shown(workspace: Workspace, other: Path) -> None:
    git(other, "update-server-info")
    with git_server(other, "me", "s3:cr@t") as server:
        watch = WatchSettings(repository=server.url.replace("s3:cr@t", "s3%3Acr%40t"))
        root = data_root(workspace, watch)
        bare = server.url.replace("me:s3:cr@t@", "")
        assert dataset_version(root, "legal").repository == bare
        assert any(b"git-remote-http" in line or b"remote-http" in line for line in server.lines), "git was at work"
        assert [line for line in server.lines if b"cr@t" in line or b"cr%40t" in line] == []
        files = [path for path in workspace.cache.rglob("*") if path.is_file()]
        assert not any(b"s3" in path.read_bytes() and b"cr@t" in path.read_bytes() for path in files)
        wrong = WatchSettings(repository=server.url.replace("s3:cr@t", "0ther"))
        with pytest.raises(DatasetError, match=f"^cannot fetch {re.escape(bare)}: ") as caught:
            data_root(workspace, wrong)
        assert "0ther" not in str(caught.value)
        assert "me" not in str(caught.value).split("http://")[1].split("/")[0]
        assert data_root(workspace, wrong, dataset_version(root, "legal").git_rev) == root, "it is the same repository"


def test_a_password_is_for_its_own_host_and_kept_by_no_helper_of_the_user(
    workspace: Workspace, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(other, "update-server-info")
    store = tmp_path / "kept"
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "credential.helper")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", f"store --file={store}")
    with git_server(other, "me", "secret") as server:
        data_root(workspace, WatchSettings(repository=server.url))
        assert not store.exists()
        host = server.url.partition("@")[2]
        store.write_text(f"http://me:secret@{host.removesuffix('/.git')}\n")
        shutil.rmtree(workspace.cache)
        data_root(workspace, WatchSettings(repository=f"http://me@{host}"))  # the user's helper knows the password
    assert login_environment("http://h", None) == {}
    there = login_environment("https://h:1/x", ("me", "secret"))
    assert {there[name] for name in there if name.startswith("GIT_CONFIG_KEY")} == {"credential.https://h:1.helper"}


def test_old_data_stays_where_its_repository_is_when_the_setting_changes(workspace: Workspace, other: Path) -> None:
    put(workspace.root, "legal", "law of the workspace", push=False)
    git(workspace.root, "remote", "add", "origin", "https://127.0.0.1:9/never-pushed.git")
    of_workspace = dataset_version(workspace.root, "legal")
    of_other = dataset_version(data_root(workspace, url(other)), "legal")
    assert text(workspace, url(other), of_workspace) == "law of the workspace"
    shutil.rmtree(workspace.cache)
    for watch in (WatchSettings(), WatchSettings(repository=str(other))):  # cloned again; read in place
        shutil.rmtree(workspace.cache / of_other.md5, ignore_errors=True)
        assert text(workspace, watch, of_other) == "the law"
    other.rename(other.with_name("away"))
    assert text(workspace, WatchSettings(), of_other) == "the law"  # fetched once is enough


def test_a_workspace_that_moved_finds_its_data(workspace: Workspace, tmp_path: Path) -> None:
    put(workspace.root, "legal", "law of the workspace", push=False)
    version = dataset_version(workspace.root, "legal")
    workspace.root.rename(tmp_path / "moved")
    assert text(Workspace(tmp_path / "moved"), WatchSettings(), version) == "law of the workspace"


@pytest.mark.parametrize(
    ("repository", "is_url"),
    [
        ("https://host/x.git", True), ("file:///x", True), ("ssh://git@host/x", True), ("git@host:team/x.git", True),
        ("/x", False), ("../x", False), ("x@y", False), ("data:x", False), ("--upload-pack=x://y", False),
    ],
)  # fmt: skip
def test_what_is_a_url_and_what_is_a_path(workspace: Workspace, repository: str, is_url: bool) -> None:
    import flows.data.repositories

    assert flows.data.repositories.is_url(repository) == is_url
