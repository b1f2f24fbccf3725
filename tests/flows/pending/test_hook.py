"""The git hooks, and what they would tell a server: real git, DVC, shells; the server itself is in test_up.py."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from flows.cli import main
from flows.data.git import git
from flows.pending import hook
from flows.pending.hook import HookError
from flows.pending.notify import NotifyError, changed_since, notify


@pytest.fixture(autouse=True)
def _no_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "somebody")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "somebody@localhost")


@pytest.fixture
def hooks(bench) -> Path:
    return bench.root / ".git" / "hooks"


@pytest.fixture
def told(tmp_path, monkeypatch, bench):
    """told() -> what the hooks have told so far; in place of Python a script stands that writes its arguments down."""
    log = tmp_path / "told"
    fake = tmp_path / "a python"  # a path with a space
    fake.write_text(f'#!/bin/sh\necho "$(pwd) ${{GIT_DIR-unset}} $*" >> {shlex.quote(str(log))}\n')
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    hook.install(bench.project)

    def lines(count: int) -> list[str]:
        waiter = 'while [ "$(wc -l < "$1")" -lt "$2" ]; do sleep 0.05; done'
        log.touch()
        subprocess.run(["timeout", "20", "sh", "-c", waiter, "-", str(log), str(count)], check=True)
        return log.read_text().splitlines()

    return lines


def test_a_commit_and_a_merge_tell_what_came_before_them(bench, told) -> None:
    command = f"{bench.root} unset -P -m flows.cli notify --workspace {bench.root} --since"
    before = bench.commit("code", seed=1)
    assert told(1) == [f"{command} "], "nothing came before the first commit"
    bench.commit("legal", seed=2)
    assert told(2)[1] == f"{command} {before}"
    branch = git(bench.root, "rev-parse", "--abbrev-ref", "HEAD").strip()
    git(bench.root, "checkout", "--quiet", "-b", "side", before)
    git(bench.root, "commit", "--quiet", "--allow-empty", "--message", "x", options=("-c", "core.hooksPath=/nowhere"))
    git(bench.root, "checkout", "--quiet", branch)
    head = git(bench.root, "rev-parse", "HEAD").strip()
    git(bench.root, "merge", "--quiet", "--no-edit", "side")
    assert told(3)[2] == f"{command} {head}"


def test_a_commit_says_nothing_and_succeeds_where_nobody_listens(bench, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "gone"))
    hook.install(bench.project)
    done = subprocess.run(
        ["git", "-c", "user.name=x", "-c", "user.email=x@y", "commit", "--quiet", "--allow-empty", "--message", "x"],
        cwd=bench.root,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout + done.stderr == ""


def test_installing_twice_changes_nothing_and_uninstalling_leaves_no_trace(bench, hooks) -> None:
    before = sorted(hooks.glob("*")) if hooks.is_dir() else []
    assert hook.install(bench.project) == [hooks / "post-commit", hooks / "post-merge"]
    texts = [path.read_text() for path in hook.install(bench.project)]
    assert texts == [path.read_text() for path in hook.install(bench.project)]
    assert all(text.count("flows.cli notify") == 1 for text in texts)
    assert hook.uninstall(bench.project) == [hooks / "post-commit", hooks / "post-merge"]
    assert sorted(hooks.glob("*")) == before
    assert hook.uninstall(bench.project) == []


def test_another_hook_keeps_its_content_and_its_mode(bench, hooks) -> None:
    theirs = '#!/usr/bin/env bash\nset -e\necho theirs > "$(git rev-parse --show-toplevel)/seen"\nexit 0\n'
    hooks.mkdir(exist_ok=True)
    path = hooks / "post-commit"
    path.write_text(theirs)
    path.chmod(0o700)
    hook.install(bench.project)
    assert path.read_text().replace(theirs.partition("\n")[2], "") != path.read_text()
    git(bench.root, "commit", "--quiet", "--allow-empty", "--message", "x")
    assert (bench.root / "seen").read_text() == "theirs\n"
    assert path.stat().st_mode & 0o777 == 0o700
    hook.uninstall(bench.project)
    assert path.read_text() == theirs
    assert path.stat().st_mode & 0o777 == 0o700


def test_a_configured_folder_of_hooks_counts(bench, tmp_path) -> None:
    git(bench.root, "config", "core.hooksPath", "tools/hooks")
    assert hook.install(bench.project)[0] == bench.root / "tools" / "hooks" / "post-commit"
    assert not (bench.root / ".git" / "hooks" / "post-commit").exists()


@pytest.mark.parametrize(
    ("text", "mode", "reason"),
    [
        ("#!/usr/bin/env python3\nprint()\n", 0o755, "is no shell script"),
        ("echo\n", 0o755, "is no shell script"),
        ("#!/bin/sh\n", 0o644, "is not executable"),
    ],
)
def test_a_hook_that_cannot_be_added_to_is_left_alone(bench, hooks, text: str, mode: int, reason: str) -> None:
    hooks.mkdir(exist_ok=True)
    path = hooks / "post-merge"
    path.write_text(text)
    path.chmod(mode)
    with pytest.raises(HookError, match=reason):
        hook.install(bench.project)
    assert path.read_text() == text
    assert not (hooks / "post-commit").exists(), "all or nothing"


def test_changed_is_what_has_other_data_than_at_a_commit(bench) -> None:
    first = bench.commit("code", seed=1)
    bench.commit("legal", seed=2)
    third = bench.commit("code", seed=3)
    assert changed_since(bench.project, first) == ["legal", "code"]
    assert changed_since(bench.project, f"{third}~1") == ["code"]
    assert changed_since(bench.project, third) == []
    assert changed_since(bench.project, "") == ["legal", "code"]


def test_without_a_server_notify_says_so_in_one_line(bench, capsys) -> None:
    bench.commit("code", seed=1)
    assert main(["notify", "--workspace", str(bench.root), "code"]) == 2
    said = f"copal: no Prefect server to notify: run `copal up` in {bench.root}, or set PREFECT_API_URL\n"
    assert capsys.readouterr().err == said
    assert main(["notify", "--workspace", str(bench.root)]) == 2
    assert capsys.readouterr().err == "copal: name domains, or --since REV\n"
    assert main(["notify", "--workspace", str(bench.root), "--since", "HEAD"]) == 0
    assert capsys.readouterr().out == "nothing to notify of: no domain changed\n"


def test_a_server_that_does_not_answer_is_named(bench, monkeypatch) -> None:
    bench.commit("code", seed=1)
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    monkeypatch.setenv("PREFECT_CLIENT_MAX_RETRIES", "0")
    with pytest.raises(NotifyError, match=r"^the Prefect server at http://127.0.0.1:9/api was not notified: "):
        notify(bench.project, ["code"])


def test_a_server_on_this_machine_is_not_asked_for_through_a_proxy(bench, prefect, monkeypatch) -> None:
    from prefect.settings import PREFECT_API_URL

    bench.commit("code", seed=1)
    monkeypatch.setenv("PREFECT_API_URL", PREFECT_API_URL.value())
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert notify(bench.project, ["code"]) == PREFECT_API_URL.value()


def test_a_domain_that_is_not_tracked_is_not_notified_of(bench, capsys, monkeypatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    bench.commit("code", seed=1)
    assert main(["notify", "--workspace", str(bench.root), "cod"]) == 2
    assert f"DVC does not track data/cod in {bench.root}; it tracks code" in capsys.readouterr().err
