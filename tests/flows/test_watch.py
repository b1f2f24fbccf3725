"""The watcher's loop on a tiny model, with real git, DVC and MLflow; a step is a plain function, without Prefect."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from copal.errors import DataError
from flows.cli import main
from flows.data.dataset import DatasetError, MissingDataError
from flows.pending.missing_data import waiting
from flows.pending.plan import plan
from flows.pending.status import status
from flows.pending.take_up import RefusedError, take_up
from flows.project import open_project
from flows.step.run import plain_tasks, run_step
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


def noting_step() -> tuple[list[str], Callable[[str, str, str], int | None]]:
    """The domains that were tried, and a step that writes them down."""
    taken: list[str] = []

    def noted(root: str, domain: str, rev: str) -> int | None:
        taken.append(domain)
        return step(root, domain, rev)

    return taken, noted


def git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), "-c", "user.name=test", "-c", "user.email=test@localhost", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def take(bench, now: datetime = NOON, one=step) -> list[int]:
    return take_up(str(bench.root), one, plain_tasks().gates, lambda: now)


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
    taken, noted = noting_step()
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


@pytest.mark.usefixtures("by_hand")
def test_watch_says_in_one_line_that_only_data_is_missing(bench, capsys):
    bench.commit("code", 0)
    bench.lose_data()
    code, out, err = told(bench, capsys, "watch", "--once")
    assert (code, err) == (0, "")
    pending, waits = out.splitlines()
    assert pending.startswith("pending: code at ")
    assert waits.startswith("waiting for data: code at ")
    assert "looked for once since" in waits


# --- data that cannot be used


def test_refused_data_is_not_tried_again_before_it_or_the_settings_change(bench, capsys):
    """Issue 13, point 9."""
    bench.commit("bad", 0, documents=3)
    bench.commit("code", 1)
    taken, noted = noting_step()
    with pytest.raises(RefusedError, match="data/bad has"):
        take(bench, one=noted)
    assert taken == ["bad", "code"]
    shutil.rmtree(bench.workspace.cache)
    with pytest.raises(RefusedError, match=r"data/bad at .* was refused, and is not tried again .*: data/bad has"):
        take(bench, one=noted)
    code, out, err = told(bench, capsys, "watch", "--once")
    assert (code, err.count("\n")) == (2, 1)
    assert "data/bad has" in err
    assert out.startswith("nothing new: version 2 of tiny knows code")
    assert taken == ["bad", "code"]  # neither fetched nor read
    assert not list(bench.workspace.cache.glob("*.dir"))  # nothing was fetched

    (found,) = status(bench.project)["refused"]
    assert (found["domain"], found["dvc_md5"][-4:]) == ("bad", ".dir")
    assert found["reason"].startswith("data/bad has")
    assert "refused: bad at " in told(bench, capsys, "status")[1]
    assert "refused: data/bad: data/bad has" in told(bench, capsys, "doctor")[1]

    bench.set("evaluation_share: 0.4", "evaluation_share: 0.5")
    assert look(bench)[0] == ["bad"]
    bench.set("evaluation_share: 0.5", "evaluation_share: 0.4")
    assert look(bench)[0] == []
    bench.commit("bad", 2)
    assert take(bench, one=noted) == [3]
    assert status(bench.project)["refused"] == []


def test_a_step_by_hand_tries_refused_data_and_what_it_makes_of_it_counts(bench, monkeypatch):
    sha = bench.commit("code", 0)
    with monkeypatch.context() as patch:
        patch.setattr("copal.documents.ENDINGS", ())
        patch.setattr("copal.domain_files.ENDINGS", ())  # as an older copal, which could not read it
        with pytest.raises(RefusedError, match="holds no document"):
            take(bench)
    assert look(bench)[0] == []
    assert step(str(bench.root), "code", sha) == 2
    assert bench.project.ledger.refusals() == {}


def test_an_earlier_domain_that_cannot_be_read_refuses_no_other(bench):
    bench.commit("code", 0)
    assert take(bench) == [2]
    md5 = bench.registry.record(bench.registry.head()).step.dvc_md5
    bench.commit("legal", 1)
    (bench.workspace.cache / md5 / "documents.jsonl").write_text("no JSON\n")
    with pytest.raises(RefusedError, match=r"data/legal: data/code/documents.jsonl, line 1: not JSON"):
        take(bench)
    assert look(bench)[0] == ["legal"]
    assert bench.project.ledger.refusals() == {}


def test_a_link_that_git_tracks_in_the_place_of_a_domain_leads_nowhere(bench, tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "a.txt").write_text("what nobody may read")
    bench.commit("code", 0)
    shutil.rmtree(bench.root / "data" / "code")
    (bench.root / "data" / "code").symlink_to(tmp_path / "secret")
    git(bench.root, "add", "--force", "data/code")
    git(bench.root, "commit", "-q", "-m", "a link")
    with contextlib.suppress(RefusedError):
        take(bench)
    files = [path for path in bench.workspace.private.rglob("*") if path.is_file()]
    assert not [path for path in files if b"what nobody may read" in path.read_bytes()]


@pytest.mark.parametrize("name", ["caf\udce9.txt", "\x1b[2J.md", "sub\n/a.txt"], ids=ascii)
def test_a_listing_with_names_that_are_none_is_refused_before_anything_is_written(bench, name):
    """DVC's own hand writes none, so that of somebody else does."""
    bench.commit("code", 0)
    objects = bench.root / ".dvc" / "cache" / "files" / "md5"
    pointer = bench.root / "data" / "code.dvc"
    (listing,) = objects.rglob("*.dir")
    content = listing.read_text().replace('"documents.jsonl"', json.dumps(name)).encode()
    old, new = f"{listing.parent.name}{listing.name}", f"{hashlib.md5(content).hexdigest()}.dir"
    (objects / new[:2]).mkdir(exist_ok=True)
    (objects / new[:2] / new[2:]).write_bytes(content)
    pointer.write_text(pointer.read_text().replace(old, new))
    git(bench.root, "commit", "-q", "-a", "-m", "names that are none")

    with pytest.raises(RefusedError) as caught:
        take(bench)

    assert f"data/code holds {name!a}: the name is not UTF-8, or has control characters" in str(caught.value)
    assert not list(bench.workspace.cache.glob("*.dir"))
    assert look(bench)[0] == []  # it is not tried again


def test_letters_in_names_and_in_the_path_of_the_workspace_are_letters(make_bench, tmp_path, capsys):
    bench = make_bench(tmp_path / "a%20b::c#d" / "[w]?")
    for seed, domain in enumerate(("code", "legal")):
        bench.write(domain, seed)
        for name in ("std::vector", "100%", "%41", "a#b", "a?b[1]*"):
            (bench.root / "data" / domain / f"{name}.txt").write_text(f"{domain} of {name}")
        bench.track(domain)
    assert take(bench) == [2, 3]
    shutil.rmtree(bench.workspace.cache)
    for command in (["verify", "3"], ["status"], ["export", "3", str(tmp_path / "%out#")]):
        code, out, err = told(bench, capsys, *command)
        assert (code, err) == (0, ""), (command, out)


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
    gone = (
        "data/legal is no longer tracked here; the model keeps what it knows of it; to take that out: "
        "`copal withdraw legal --why TEXT`"
    )
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
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "https://example.invalid/team.git")  # git gets the login in another way
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
