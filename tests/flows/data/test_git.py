from __future__ import annotations

import os

import pytest

from flows.data.git import GitError, commit, git, run_git


@pytest.fixture
def repo(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    git(tmp_path, "init", "--quiet")
    return tmp_path


def test_a_commit_takes_only_the_paths_it_is_given_and_what_else_is_staged_stays_staged(repo):
    for name in "ab":
        (repo / name).write_text(name)
    git(repo, "add", ".")
    commit(repo, "a only", ["a"])
    assert git(repo, "ls-tree", "--name-only", "HEAD") == "a\n"
    assert git(repo, "diff", "--cached", "--name-only") == "b\n"
    commit(repo, "the rest")
    assert git(repo, "log", "--format=%s") == "the rest\na only\n"


def test_where_nothing_is_staged_no_commit_is_made(repo):
    commit(repo, "nothing")
    assert run_git(repo, "rev-parse", "--verify", "HEAD").returncode != 0


def test_where_git_knows_no_identity_the_author_is_copal(repo):
    (repo / "a").write_text("a")
    git(repo, "add", ".")
    commit(repo, "a")
    assert git(repo, "log", "--format=%an <%ae>") == "copal <copal@localhost>\n"


def test_what_git_refuses_is_one_line(repo, monkeypatch):
    with pytest.raises(GitError, match="git log failed in") as caught:
        git(repo, "log", "nope")
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(GitError, match="not installed"):
        git(repo, "log")
