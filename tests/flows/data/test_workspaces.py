"""A workspace that is named by a URL: its clone is brought up to date, and what runs left in it stays."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from flows.data.dataset import DatasetError, DatasetVersion
from flows.data.git import commit, git
from flows.data.workspaces import workspace_folder
from flows.project import data_of, open_project
from flows.workspace import WorkspaceError

PARAMS = "model: {name: %s}\n"


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: Path) -> Path:
    """A repository with a workspace in it; this host keeps clones elsewhere."""
    monkeypatch.setenv("COPAL_HOME", str(tmp_path / "home"))
    root = tmp_path / "remote"
    shutil.copytree(template, root)
    write(root, "first")
    return root


def write(root: Path, name: str) -> None:
    (root / "params.yaml").write_text(PARAMS % name)
    git(root, "add", "--all")
    commit(root, name)


def test_a_url_is_cloned_and_followed_and_keeps_what_runs_left(remote):
    project = open_project(f"file://{remote}")
    assert (project.name, project.place) == ("first", f"file://{remote}")
    left = project.workspace.private / "runs" / "half"
    left.mkdir(parents=True)
    (project.workspace.root / "params.yaml").write_text("edited: by hand")
    (remote / "link").symlink_to("/etc")
    write(remote, "second")
    again = open_project(f"file://{remote}")
    assert again.name == "second"
    assert again.workspace == project.workspace
    assert left.is_dir()
    assert not (again.workspace.root / "link").is_symlink()


def test_a_revision_is_a_branch_a_tag_or_a_commit(remote):
    git(remote, "tag", "v1")
    sha = git(remote, "rev-parse", "HEAD").strip()
    git(remote, "branch", "stable")
    write(remote, "second")
    named = {revision: open_project(f"file://{remote}#{revision}").name for revision in ("v1", sha, "stable", "main")}
    assert named == {"v1": "first", sha: "first", "stable": "first", "main": "second"}
    with pytest.raises(DatasetError, match=r"has no branch 'nosuch'"):
        workspace_folder(f"file://{remote}#nosuch")


def test_two_revisions_have_a_clone_each(remote):
    git(remote, "branch", "stable")
    assert workspace_folder(f"file://{remote}") != workspace_folder(f"file://{remote}#stable")


def test_a_password_in_the_url_is_refused_and_not_shown():
    with pytest.raises(WorkspaceError, match="give it to git") as caught:
        workspace_folder("https://me:hunter2@git.example/team.git")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("url", ["ext::sh -c true://x", "ext://sh"])
def test_what_git_would_take_for_a_command_is_refused(url):
    with pytest.raises((DatasetError, WorkspaceError)):
        open_project(url)


def test_an_md5_that_is_a_path_leaves_no_mark_beside_the_cache(remote, tmp_path):
    project = open_project(f"file://{remote}")
    (project.workspace.private / "runs.dir").mkdir(parents=True)
    version = DatasetVersion(domain="code", path="data/code", md5="../runs.dir", git_rev="0" * 40, repository="x")
    with pytest.raises(DatasetError, match="is not the md5 of a folder"):
        data_of(project, version)
    assert [path.name for path in project.workspace.private.iterdir()] == ["runs.dir"]


def test_a_path_is_the_folder_itself(tmp_path):
    assert workspace_folder(str(tmp_path)) == tmp_path
