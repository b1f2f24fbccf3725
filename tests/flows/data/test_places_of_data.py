"""Where the data repository may be, and which commit of it is meant: each is right, or one line."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from flows.cache import Cache
from flows.data.commits import watched_revision
from flows.data.dvc import add_and_commit, init_repository
from flows.data.fetch import fetch_version
from flows.data.repositories import data_root
from flows.data.versions import dataset_version, dataset_versions
from flows.settings import WatchSettings
from flows.workspace import Workspace


@pytest.fixture(autouse=True)
def _user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_GLOBAL_CONFIG_DIR", str(tmp_path / "none"))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Two commits with the domain legal, then code; the data is on a remote."""
    root = tmp_path / "other"
    init_repository(root)
    (root / ".dvc" / "config").write_text(
        f"['remote \"store\"']\n    url = {tmp_path / 'store'}\n[core]\n    remote = store\n"
    )
    git(root, "add", ".dvc/config")
    for domain in ("legal", "code"):
        (root / "data" / domain).mkdir(parents=True)
        (root / "data" / domain / "text.txt").write_text(domain)
        add_and_commit(root, domain, domain)
    from dvc.repo import Repo

    with Repo(str(root)) as dvc:
        dvc.push()
    shutil.rmtree(root / ".dvc" / "cache")
    return root


def git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), "-c", "user.name=test", "-c", "user.email=test@localhost", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def domains(workspace: Workspace, watch: WatchSettings) -> list[str]:
    """The domains at the watched branch, each fetched."""
    root = data_root(workspace, watch)
    found = dataset_versions(root, watched_revision(root, watch.branch))
    for version in found:
        assert (
            fetch_version(Cache(workspace.cache), workspace, watch, version) / "text.txt"
        ).read_text() == version.domain
    return [version.domain for version in found]


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_the_watched_branch_is_the_branch_where_a_tag_has_its_name(
    workspace: Workspace, other: Path, scheme: str
) -> None:
    git(other, "branch", "release")
    git(other, "tag", "release", "HEAD~1")
    watch = WatchSettings(repository=f"{scheme}{other}", branch="release")
    assert domains(workspace, watch) == ["legal", "code"]
    assert git(data_root(workspace, watch), "rev-parse", "HEAD") == git(other, "rev-parse", "refs/heads/release")


def test_what_is_no_branch_here_is_taken_as_it_is(workspace: Workspace, other: Path) -> None:
    git(other, "update-ref", "refs/remotes/origin/main", "HEAD~1")
    assert domains(workspace, WatchSettings(repository=str(other), branch="origin/main")) == ["legal"]


def test_a_path_may_begin_at_home(workspace: Workspace, other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(other.parent))
    watch = WatchSettings(repository="~/other")
    assert data_root(workspace, watch) == other
    assert domains(workspace, watch) == ["legal", "code"]


def test_a_bare_repository_by_path(workspace: Workspace, other: Path, tmp_path: Path) -> None:
    git(tmp_path, "clone", "-q", "--bare", str(other), "bare.git")
    watch = WatchSettings(repository=str(tmp_path / "bare.git"))
    assert domains(workspace, watch) == ["legal", "code"]
    assert not (tmp_path / "bare.git" / ".dvc").exists()


def test_a_work_tree_and_a_submodule(workspace: Workspace, other: Path, tmp_path: Path) -> None:
    git(other, "worktree", "add", "-q", "--detach", str(tmp_path / "tree"), "HEAD~1")
    assert domains(workspace, WatchSettings(repository="../tree")) == ["legal"]
    outer = tmp_path / "outer"
    git(tmp_path, "init", "-q", "outer")
    git(outer, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", f"file://{other}", "texts")
    assert domains(workspace, WatchSettings(repository=str(outer / "texts"))) == ["legal", "code"]


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_shallow_repository_has_what_is_not_cut_off(
    workspace: Workspace, other: Path, tmp_path: Path, scheme: str
) -> None:
    git(tmp_path, "clone", "-q", "--depth", "1", f"file://{other}", "shallow")
    watch = WatchSettings(repository=f"{scheme}{tmp_path / 'shallow'}")
    assert domains(workspace, watch) == ["code", "legal"]  # both changed at the cut
    assert dataset_version(data_root(workspace, watch), "legal").git_rev == git(other, "rev-parse", "HEAD")
