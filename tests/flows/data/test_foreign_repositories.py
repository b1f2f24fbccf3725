"""A data repository comes from somebody else: copal takes its pointers and remotes, and nothing of theirs runs."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from flows.cache import Cache
from flows.data.dataset import DatasetError, DatasetVersion
from flows.data.dvc import add_and_commit, init_repository
from flows.data.fetch import fetch_version
from flows.data.git import git as copals_git
from flows.data.repositories import data_root
from flows.data.storage import storage_of
from flows.data.versions import dataset_version, dataset_versions
from flows.settings import WatchSettings
from flows.workspace import Workspace


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A file that is there once a command of the repository's ran."""
    return tmp_path / "it-ran"


@pytest.fixture(autouse=True)
def _user(tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user has no DVC settings but one remote's key, and filters and the protocol `ext` in git."""
    folder = tmp_path / "user"
    folder.mkdir()
    (folder / "config").write_text("['remote \"mine\"']\n    url = ssh://host/x\n    password = s3cret\n")
    (folder / "gitconfig").write_text(
        f'[filter "evil"]\n smudge = "touch {marker}; cat"\n[protocol "ext"]\n allow = always\n'
    )
    monkeypatch.setenv("DVC_GLOBAL_CONFIG_DIR", str(folder))
    monkeypatch.setenv("DVC_SYSTEM_CONFIG_DIR", str(tmp_path / "none"))
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(folder / "gitconfig"))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder of the user's that the repository would like to be written to."""
    folder = tmp_path / "outside"
    folder.mkdir()
    return folder


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A repository with a DVC remote and the domain legal, pushed."""
    root = tmp_path / "other"
    init_repository(root)
    configure(root, f"['remote \"store\"']\n    url = {tmp_path / 'store'}\n[core]\n    remote = store\n")
    (root / "data" / "legal").mkdir(parents=True)
    (root / "data" / "legal" / "text.txt").write_text("the law")
    add_and_commit(root, "legal", "legal")
    from dvc.repo import Repo

    with Repo(str(root)) as dvc:
        dvc.push()
    for name in ("cache", "tmp"):
        shutil.rmtree(root / ".dvc" / name)
    return root


def git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), "-c", "user.name=test", "-c", "user.email=test@localhost", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def configure(root: Path, text: str) -> None:
    (root / ".dvc" / "config").write_text(text)
    git(root, "add", ".dvc/config")


def link(root: Path, name: str, target: Path) -> None:
    """Commit a link in `.dvc`, past DVC's own .gitignore."""
    (root / ".dvc" / name).symlink_to(target)
    git(root, "add", "--force", f".dvc/{name}")
    git(root, "commit", "-q", "-m", f"a link {name}")


def url(repository: Path) -> WatchSettings:
    return WatchSettings(repository=f"file://{repository}")


def text(workspace: Workspace, watch: WatchSettings, version: DatasetVersion) -> str:
    return (fetch_version(Cache(workspace.cache), workspace, watch, version) / "text.txt").read_text()


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize("name", ["tmp", "cache", "config.local"])
def test_links_in_dvc_lead_a_clone_nowhere_and_a_repository_in_place_is_refused(
    workspace: Workspace, other: Path, outside: Path, name: str
) -> None:
    (outside / "file").write_text("[core]\n    remote = none\n")
    link(other, name, outside / "file" if name == "config.local" else outside)
    version = dataset_version(data_root(workspace, url(other)), "legal")
    assert text(workspace, url(other), version) == "the law"
    shutil.rmtree(workspace.cache)
    watch = WatchSettings(repository=str(other))
    with pytest.raises(DatasetError, match=rf"'\.dvc/{name}' is a link that comes with the repository"):
        text(workspace, watch, dataset_version(data_root(workspace, watch), "legal"))
    with pytest.raises(DatasetError, match="is a link that comes with the repository"):
        init_repository(other)
    with pytest.raises(DatasetError, match="is a link that comes with the repository"):
        add_and_commit(other, "legal", "again")
    assert files(outside) == ["file"]


def test_a_dvc_folder_that_is_a_link_leads_nowhere_either(workspace: Workspace, other: Path, outside: Path) -> None:
    shutil.rmtree(other / ".dvc")
    git(other, "rm", "-rq", "--cached", ".dvc")
    (other / ".dvc").symlink_to(outside)
    git(other, "add", "--all")
    git(other, "commit", "-q", "-m", "a link")
    root = data_root(workspace, url(other))
    with pytest.raises(DatasetError, match=r"DVC cannot read .*: './\.dvc' validation failed"):
        text(workspace, url(other), dataset_version(root, "legal"))
    with pytest.raises(DatasetError, match=r"'\.dvc' is a link that comes with the repository"):
        init_repository(other)
    assert files(outside) == []


def test_folders_in_the_settings_of_a_clone_are_not_written_to(
    workspace: Workspace, other: Path, outside: Path
) -> None:
    config = (other / ".dvc" / "config").read_text()
    folders = f"    site_cache_dir = {outside}/site\n    hardlink_lock = true\n[cache]\n    dir = {outside}/cache\n"
    configure(other, config + folders)
    git(other, "commit", "-q", "-m", "folders")
    version = dataset_version(data_root(workspace, url(other)), "legal")
    assert text(workspace, url(other), version) == "the law"
    assert files(outside) == []


def test_a_cache_elsewhere_counts_where_the_user_says_so(workspace: Workspace, other: Path, outside: Path) -> None:
    config = (other / ".dvc" / "config").read_text()
    configure(other, f"{config}[cache]\n    dir = {outside}\n")
    git(other, "commit", "-q", "-m", "a cache")
    watch = WatchSettings(repository=str(other))
    version = dataset_version(data_root(workspace, watch), "legal")
    with pytest.raises(DatasetError, match=rf"sets cache.dir to {outside}, .* run `dvc cache dir --local {outside}`"):
        text(workspace, watch, version)
    assert files(outside) == []
    (other / ".dvc" / "config.local").write_text(f"[cache]\n    dir = {outside}\n")
    assert text(workspace, watch, version) == "the law"


def test_of_a_remote_what_runs_asks_or_reads_files_is_the_users_own_or_nobodys(other: Path) -> None:
    config = "[core]\n    remote = store\n['remote \"store\"']\n    url = ssh://host/x\n    keyfile = /etc/theirs\n"
    config += "    ask_password = true\n    port = 7\n"
    config += "['remote \"dav\"']\n    url = webdavs://host/x\n    bearer_token_command = touch /tmp/x\n    token = t\n"
    config += "['remote \"s3\"']\n    url = s3://b/x\n    configpath = /tmp/c\n    credentialpath = c\n    region = r\n"
    config += "['remote \"drive\"']\n    url = gdrive://x/y\n    gdrive_user_credentials_file = /tmp/written\n"
    configure(other, config)
    found = storage_of(other)
    assert found.default == "store"
    assert found.remotes == {
        "mine": {"url": "ssh://host/x", "password": "s3cret"},
        "store": {"url": "ssh://host/x", "port": "7"},
        "dav": {"url": "webdavs://host/x", "token": "t"},
        "s3": {"url": "s3://b/x", "region": "r"},
        "drive": {"url": "gdrive://x/y"},
    }
    (other / ".dvc" / "config.local").write_text("['remote \"dav\"']\n    bearer_token_command = mine\n")
    assert storage_of(other).remotes["dav"]["bearer_token_command"] == "mine"


@pytest.mark.parametrize(("theirs", "password"), [("ssh://host/x", "s3cret"), ("ssh://evil/x", None)])
def test_a_password_of_the_users_goes_to_the_url_that_it_is_for(
    other: Path, workspace: Workspace, theirs: str, password: str | None
) -> None:
    configure(other, f"['remote \"mine\"']\n    url = {theirs}\n")
    git(other, "commit", "-q", "-m", "a remote")
    for root in (other, data_root(workspace, url(other))):
        found = storage_of(root).remotes["mine"]
        assert (found["url"], found.get("password")) == (theirs, password)


def test_filters_hooks_and_submodules_of_a_clone_do_not_run(
    workspace: Workspace, other: Path, outside: Path, marker: Path
) -> None:
    (other / ".gitattributes").write_text("* filter=evil\n.dvc/** filter=evil\n")
    hooks = other / ".dvc" / "hooks"
    hooks.mkdir()
    (hooks / "post-checkout").write_text(f"#!/bin/sh\ntouch {marker}\n")
    (hooks / "post-checkout").chmod(0o755)
    head = git(other, "rev-parse", "HEAD")
    git(other, "update-index", "--add", "--cacheinfo", f"160000,{head},sub")
    (other / ".gitmodules").write_text(f'[submodule "x"]\n path = sub\n url = "ext::touch {marker}"\n')
    git(other, "add", ".gitattributes", ".gitmodules", "--force", ".dvc/hooks")
    git(other, "commit", "-q", "-m", "hostile")
    marker.unlink(missing_ok=True)
    for _ in range(2):  # cloned; fetched
        version = dataset_version(data_root(workspace, url(other)), "legal")
    assert text(workspace, url(other), version) == "the law"
    assert not marker.exists()


def test_the_work_tree_of_an_earlier_copals_clone_goes(workspace: Workspace, other: Path, outside: Path) -> None:
    root = data_root(workspace, url(other))
    (root / ".git" / "copal-clone").unlink()
    (root / ".dvc").mkdir()
    (root / ".dvc" / "tmp").symlink_to(outside)
    (outside / "kept").write_text("kept")
    data_root(workspace, url(other))
    assert files(root)[0] == ".git"
    assert [path.name for path in root.iterdir()] == [".git"]
    assert files(outside) == ["kept"]


def test_a_monitor_of_the_repository_does_not_run(other: Path, marker: Path) -> None:
    git(other, "config", "core.fsmonitor", f"touch {marker}; false")
    copals_git(other, "status", "--short")
    assert not marker.exists()


@pytest.mark.parametrize(
    "repository",
    [
        "ext::touch {marker}",
        "ext::sh -c touch% {marker}% //x://y",
        "ext://touch {marker}",
        "EXT://touch {marker}",
        "fd://7/x",
        "-ofoo@host:x",
        "--upload-pack=touch {marker}",
        "--upload-pack=touch@host:x",
        "file:///x\n--upload-pack=touch {marker}",
        "https://host/x\x1b[2J",
        "https://host/\u202ex",
    ],
)
def test_a_repository_that_is_an_option_a_command_or_two_lines_is_refused(
    workspace: Workspace, marker: Path, repository: str
) -> None:
    watch = WatchSettings(repository=repository.format(marker=marker))
    with pytest.raises(DatasetError, match="names no repository") as caught:
        data_root(workspace, watch)
    assert str(caught.value).isprintable()
    assert not marker.exists()
    assert not (workspace.cache / "repositories").exists()


def test_where_a_url_is_rewritten_to_a_command_it_does_not_run(
    workspace: Workspace, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", f"url.ext::touch {marker} .insteadOf")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "https://host/x")
    with pytest.raises(DatasetError, match="transport 'ext' not allowed"):
        data_root(workspace, WatchSettings(repository="https://host/x"))
    assert not marker.exists()
    assert os.environ.get("GIT_ALLOW_PROTOCOL") is None


def test_reading_pointers_writes_nothing_into_a_repository_in_place(other: Path) -> None:
    before = files(other)
    assert [version.domain for version in dataset_versions(other)] == ["legal"]
    assert files(other) == before
