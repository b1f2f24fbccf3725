"""The watcher's loop on a tiny model, with real git, DVC and MLflow; a step is a plain function, without Prefect."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from copal.errors import DataError
from flows.cli import main
from flows.data.dataset import DatasetError, MissingDataError
from flows.pending.missing_data import waiting
from flows.pending.plan import plan
from flows.pending.status import status
from flows.project import open_project
from flows.step.run import plain_tasks, run_step
from flows.watch import RefusedError, take_up
from flows.workspace import Workspace

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


@pytest.fixture(autouse=True)
def _on_its_own(monkeypatch):
    """Git's settings of the user are left out, and the commands leave this process's environment as it was."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    environment = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(environment)


def step(root: str, domain: str, rev: str) -> int | None:
    """What the flow `adapt` does."""
    made = run_step(open_project(root), domain, rev, plain_tasks())
    return made.number if made else None


def git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), "-c", "user.name=test", "-c", "user.email=test@localhost", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def take(bench, now: datetime = NOON, one=step) -> list[int]:
    return take_up(str(bench.root), one, lambda: now)


def look(bench, now: datetime = NOON):
    """What a check finds: what is pending, what waits, and the notes."""
    found = plan(bench.project, now)
    return [version.domain for version in found.pending], [v.domain for v, _ in found.waiting], list(found.notes)


def told(bench, capsys, *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([*arguments, "--workspace", str(bench.root)])
    return code, *capsys.readouterr()


# --- the loop


def test_what_is_committed_while_a_step_runs_is_taken_up_too(bench):
    bench.commit("code", 0)
    taken = []

    def slow(root, domain, rev):
        taken.append((domain, rev))
        if domain == "code" and len(taken) == 1:
            taken.append(("committed", bench.commit("legal", 1)))
            bench.commit("code", 2)
        return step(root, domain, rev)

    assert take(bench, one=slow) == [2, 3, 4]
    assert [domain for domain, _ in taken] == ["code", "committed", "legal", "code"]
    assert look(bench) == ([], [], [])


def test_data_that_comes_back_while_a_step_runs_is_taken_up_again(bench):
    bench.commit("code", 0)
    seeds = iter([2, 0])

    def slow(root, domain, rev):
        number = step(root, domain, rev)
        for seed in seeds:
            bench.commit("code", seed)
            break
        return number

    assert take(bench, one=slow) == [2, 3, 4]
    records = [bench.registry.record(version).step for version in bench.registry.versions()]
    assert records[1].dvc_md5 == records[3].dvc_md5 != records[2].dvc_md5


def test_a_step_that_changes_nothing_is_not_run_for_ever(bench):
    bench.commit("code", 0)
    bench.commit("legal", 1)
    taken = []
    assert take(bench, one=lambda root, domain, rev: taken.append(domain)) == []
    assert taken == ["code", "legal"]


def test_a_refused_dataset_is_tried_once_in_a_run_though_others_are_made(bench):
    bench.commit("bad", 0, documents=3)
    bench.commit("code", 1)
    bench.commit("legal", 2)
    taken = []

    def noted(root, domain, rev):
        taken.append(domain)
        return step(root, domain, rev)

    with pytest.raises(RefusedError, match="data/bad has"):
        take(bench, one=noted)
    assert taken == ["bad", "code", "legal"]


# --- data that nobody has pushed yet


def test_a_pointer_without_data_waits_and_is_adapted_to_when_the_data_comes(bench, capsys):
    bench.commit("code", 0)
    bench.commit("legal", 1)
    sha = git(bench.root, "rev-parse", "HEAD")
    md5 = plan(bench.project).pending[1].md5
    cache = bench.root / ".dvc" / "cache"
    listing = cache / "files" / "md5" / md5[:2] / md5[2:]
    listing.rename(bench.root / ".copal" / "elsewhere")

    assert take(bench) == [2]  # no error, and code went on
    assert look(bench) == ([], ["legal"], [])
    minute = timedelta(minutes=1)
    entry = waiting(bench.workspace, "tiny")["legal"]
    assert (entry.tries, entry.since, entry.next_try) == (1, NOON, NOON + minute)
    assert take(bench, NOON + minute / 2) == []
    assert waiting(bench.workspace, "tiny")["legal"] == entry  # it was not tried
    assert look(bench, NOON + minute) == (["legal"], [], [])
    assert take(bench, NOON + minute) == []
    assert waiting(bench.workspace, "tiny")["legal"].next_try == NOON + 3 * minute

    now = datetime.now(UTC)
    assert take(bench, now) == []
    (found,) = json.loads(told(bench, capsys, "status", "--json")[1])["waiting"]
    assert found == {
        "domain": "legal", "dvc_md5": md5, "git_rev": sha, "tries": 3, "since": "2026-01-01T12:00:00+00:00",
        "next_try": (now + 4 * minute).isoformat(timespec="seconds"),
    }  # fmt: skip
    assert status(bench.project)["pending"] == []
    line = f"waiting for data: legal at {md5[:10]}, looked for 3 times since 2026-01-01T12:00:00+00:00"
    assert line in " ".join(told(bench, capsys, "status")[1].split())
    code, out, err = told(bench, capsys, "watch", "--once")
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert out.startswith(line)

    (bench.root / ".copal" / "elsewhere").rename(listing)
    assert take(bench, now + 4 * minute) == [3]
    assert waiting(bench.workspace, "tiny") == {}


def test_other_data_does_not_wait_for_the_old_data(bench):
    bench.commit("code", 0)
    bench.lose_data()
    assert take(bench) == []
    assert look(bench) == ([], ["code"], [])
    bench.commit("code", 1)
    assert look(bench) == (["code"], [], [])
    assert take(bench) == [2]
    assert waiting(bench.workspace, "tiny") == {}


def test_what_waits_is_forgotten_with_its_pointer(bench):
    bench.commit("code", 0)
    bench.lose_data()
    take(bench)
    git(bench.root, "rm", "-q", "data/code.dvc")
    git(bench.root, "commit", "-q", "-m", "Remove code")
    assert take(bench) == []
    assert waiting(bench.workspace, "tiny") == {}


def test_lost_data_of_an_earlier_domain_is_an_error(bench):
    bench.commit("code", 0)
    assert take(bench) == [2]
    bench.lose_data()
    shutil.rmtree(bench.workspace.cache)
    bench.commit("legal", 1)
    with pytest.raises(RefusedError, match=r"data/legal: .*data/code .*dvc push"):
        take(bench)
    assert waiting(bench.workspace, "tiny") == {}


def test_a_step_by_hand_does_not_wait(bench):
    sha = bench.commit("code", 0)
    bench.lose_data()
    take(bench)
    with pytest.raises(MissingDataError, match=r"data/code.*dvc push"):
        step(str(bench.root), "code", sha)


@pytest.mark.usefixtures("prefect")
def test_watch_says_in_one_line_that_only_data_is_missing(bench, capsys):
    bench.commit("code", 0)
    bench.lose_data()
    code, out, err = told(bench, capsys, "watch", "--once")
    assert (code, err) == (0, "")
    pending, waits = out.splitlines()
    assert pending.startswith("pending: code at ")
    assert waits.startswith("waiting for data: code at ")
    assert "looked for once since" in waits


# --- data in another repository


@pytest.fixture
def team(bench, template: Path, tmp_path: Path):
    """Another repository, whose data lies on its DVC remote only."""
    root = tmp_path / "team"
    shutil.copytree(template, root)
    config = f"[core]\n    remote = store\n['remote \"store\"']\n    url = {tmp_path / 'store'}\n"
    (root / ".dvc" / "config").write_text(config)
    git(root, "add", ".dvc/config")
    return type(bench)(Workspace(root), bench.base)


def push(team) -> None:
    from dvc.repo import Repo

    with Repo(str(team.root)) as dvc:
        dvc.push()
    team.lose_data()


def watch_other(bench, repository: str | None, more: str = "") -> None:
    """Name another repository in params.yaml; None: none."""
    text = bench.workspace.params.read_text().split("watch:")[0]
    watch = f"watch: {{repository: '{repository}'{more}}}\n" if repository else ""
    bench.workspace.params.write_text(text + watch)


@pytest.mark.parametrize("kind", ["path", "URL"])
def test_the_main_job_with_the_data_in_another_repository(bench, team, kind, capsys):
    watch_other(bench, "../team" if kind == "path" else f"file://{team.root}")
    first = team.commit("code", 0)
    if kind == "URL":
        push(team)
    before = (team.snapshot(), git(team.root, "status", "--porcelain"), git(team.root, "for-each-ref"))
    bench.commit("other", 3)  # the workspace's own domains do not count
    assert take(bench) == [2]
    record = bench.registry.record(bench.registry.head())
    assert (record.step.name, record.step.git_rev) == ("code", first)
    assert record.step.repository == (str(team.root) if kind == "path" else f"file://{team.root}")
    assert (team.snapshot(), git(team.root, "status", "--porcelain"), git(team.root, "for-each-ref")) == before

    team.commit("legal", 1)
    team.commit("code", 2)
    if kind == "URL":
        push(team)
    assert step(str(bench.root), "code", first) is None  # a revision of that repository
    assert take(bench) == [3, 4]
    assert told(bench, capsys, "watch", "--once")[1].startswith("nothing new: version 4 of tiny knows code, legal")
    assert "domains at HEAD: legal, code" in told(bench, capsys, "doctor")[1]


def test_a_history_that_was_rewritten_makes_a_new_version_and_keeps_the_old(bench, team):
    watch_other(bench, f"file://{team.root}", ", branch: main")
    team.commit("legal", 1)
    old = team.commit("code", 0)
    push(team)
    assert take(bench) == [2, 3]
    assert look(bench) == ([], [], [])

    git(team.root, "checkout", "-q", "--orphan", "fresh")
    shutil.rmtree(team.root / "data" / "legal")
    git(team.root, "rm", "-q", "--cached", "data/legal.dvc")
    (team.root / "data" / "legal.dvc").unlink()
    team.commit("code", 2)
    push(team)
    git(team.root, "branch", "-M", "fresh", "main")
    git(team.root, "reflog", "expire", "--expire=now", "--all")
    git(team.root, "gc", "-q", "--prune=now")
    note = (
        f"data/code: commit {old[:10]}, of which version 3 was made, is not in the history of main (any more); "
        "the lineage keeps it"
    )
    gone = "data/legal is no longer tracked here; the model keeps what it knows of it"
    assert look(bench) == (["code"], [], [note, gone])
    for folder in bench.workspace.cache.glob("*.dir"):
        shutil.rmtree(folder)
    assert take(bench) == [4]  # legal is fetched again, at a commit that the remote does not have any more
    assert look(bench) == ([], [], [gone])
    assert bench.registry.record(bench.registry.version(3)).step.git_rev == old


def test_a_rewritten_workspace_whose_old_commit_is_gone_is_noted_too(bench):
    old = bench.commit("code", 0)
    assert take(bench) == [2]
    git(bench.root, "checkout", "-q", "--orphan", "fresh")
    git(bench.root, "commit", "-q", "-m", "the same data")
    git(bench.root, "branch", "-M", "fresh", "main")
    git(bench.root, "reflog", "expire", "--expire=now", "--all")
    git(bench.root, "gc", "-q", "--prune=now")
    pending, _, notes = look(bench)
    assert pending == []  # the same md5
    assert [note for note in notes if old[:10] in note and "version 2" in note and "history of HEAD" in note] == notes
    assert notes


def test_a_remote_that_is_away_is_one_line_and_nothing_is_lost(bench, team, capsys):
    watch_other(bench, f"file://{team.root}")
    team.commit("code", 0)
    push(team)
    assert take(bench) == [2]
    away = team.root.with_name("away")
    team.root.rename(away)
    for command in (["watch", "--once"], ["status"], ["adapt", "code"]):
        code, _, err = told(bench, capsys, *command)
        assert code == 2
        assert err.startswith(f"copal: cannot fetch file://{team.root}: ")
        assert err.count("\n") == 1
    away.rename(team.root)
    assert look(bench) == ([], [], [])


def test_the_lineage_outlives_a_change_of_the_repository(bench, team):
    bench.commit("code", 0)  # in the workspace
    assert take(bench) == [2]
    watch_other(bench, f"file://{team.root}")
    team.commit("legal", 1)
    push(team)
    shutil.rmtree(bench.workspace.cache)
    assert take(bench) == [3]  # code comes from the workspace, legal from the team
    watch_other(bench, None)
    bench.commit("code", 2)
    shutil.rmtree(bench.workspace.cache)
    assert take(bench) == [4]  # legal comes from the team, which no setting names
    bench.commit("code", 3)
    shutil.rmtree(bench.workspace.cache)
    team.root.rename(team.root.with_name("away"))
    with pytest.raises(RefusedError, match=f"cannot fetch file://{team.root}"):
        take(bench)
    assert bench.registry.head().number == 4


def test_no_password_gets_into_a_record_or_a_status(bench, team, capsys, monkeypatch):
    secret = "https://me:s3cret@example.invalid/team.git"
    watch_other(bench, secret)
    team.commit("code", 0)
    push(team)
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", f"url.file://{team.root}.insteadOf")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", secret)
    assert take(bench) == [2]
    record = bench.registry.record(bench.registry.head())
    assert record.step.repository == "https://example.invalid/team.git"
    assert "s3cret" not in json.dumps(record.as_json())
    assert "s3cret" not in told(bench, capsys, "status", "--json")[1]
    files = [path for path in bench.workspace.private.rglob("*") if path.is_file()]
    assert not [path for path in files if b"s3cret" in path.read_bytes()]


def test_a_bad_dataset_in_another_repository_is_named(bench, team):
    watch_other(bench, "../team")
    team.commit("code", 0, documents=3)
    with pytest.raises(RefusedError, match="data/code has"):
        take(bench)
    watch_other(bench, "../nowhere")
    with pytest.raises(DatasetError, match="nowhere is not a folder"):
        take(bench)
    with pytest.raises(DataError, match="cannot name a domain"):
        step(str(bench.root), "Bad", "HEAD")
