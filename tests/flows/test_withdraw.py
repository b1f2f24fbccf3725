"""Withdrawing a domain: through the tasks of a step, on a tiny model, with real git, DVC and MLflow."""

from __future__ import annotations

import pkgutil
import shutil
from dataclasses import replace

import pytest
import torch

from copal.errors import DataError, StateError
from flows.cli import main
from flows.lineage.chain import log_problems
from flows.lineage.entries import PurgeDetails, WithdrawalDetails
from flows.lineage.files import verify_files
from flows.lineage.record import Withdrawn
from flows.pending.plan import plan
from flows.pending.status import status
from flows.project import data_of, hold_lineage
from flows.step import run
from flows.step.finish import finish
from flows.step.gc import collect
from flows.step.resolve import NoBaseError, WithdrawError
from flows.step.run import plain_tasks, run_step, run_withdrawal
from support.benches import copy_workspace
from support.toys import other_masks, weights


def step(bench, domain: str) -> int:
    made = run_step(bench.project, domain, None, plain_tasks())
    assert made
    return made.number


def withdraw(bench, domain: str, why: str = "the licence ended", *, purge: bool = False):
    return run_withdrawal(bench.project, domain, why, plain_tasks(), purge=purge)


def pending(bench) -> list[str]:
    return [version.domain for version in plan(bench.project).pending]


def told(bench) -> list[dict]:
    """The log without the gates."""
    assert log_problems(bench.project.ledger.log_as_stored(), bench.registry.log_anchor()) == []
    return [entry for entry in bench.log if entry.kind != "gates"]


def kinds(bench) -> list[tuple[str, int | None]]:
    return [(entry.kind, entry.version) for entry in told(bench)]


def no_damage(bench) -> None:
    for version in bench.registry.versions():
        record, folder = bench.registry.record(version), bench.registry.folder(version)
        dropped = {"sum_dropped": version.sum_dropped, "contribution_dropped": version.contribution_dropped}
        assert verify_files(record, folder, **dropped) == []


@pytest.fixture(scope="module")
def made(make_bench, tmp_path_factory, exchanged_files):
    """Versions 1 (base), 2 (code), 3 (legal) and 4 (medical, the head), with a copy beside the workspace."""
    bench = make_bench(tmp_path_factory.mktemp("withdraw") / "workspace")
    for seed, domain in enumerate(("code", "legal", "medical")):
        bench.commit(domain, seed)
        step(bench, domain)
    copy_workspace(bench.root, bench.root.with_name("made"))
    return bench


@pytest.fixture
def lineage(made):
    """The versions as they were made, for one test."""
    copy_workspace(made.root.with_name("made"), made.root)
    return made


def never(bench, *domains: str) -> dict[str, torch.Tensor]:
    """The weights of a lineage that saw these domains only."""
    params = bench.workspace.params.read_text()
    bench.workspace.params.write_text(params.replace("name: tiny", "name: never"))
    bench.register_root()
    number = [step(bench, domain) for domain in domains][-1]
    found = weights(bench, number)
    bench.workspace.params.write_text(params)
    return found


def test_the_version_is_that_of_a_lineage_that_never_had_the_domain(lineage, monkeypatch):
    fetched: list[str] = []

    def data_and_tell(project, version):
        fetched.append(version.domain)
        return data_of(project, version)

    monkeypatch.setattr("flows.step.work.data_of", data_and_tell)
    before = lineage.registry.record(lineage.registry.head())
    done = withdraw(lineage, "legal")
    assert done.made.number == 5
    assert set(fetched) == {"code", "medical"}  # no text of the domain is needed
    version = lineage.registry.head()
    record = lineage.registry.record(version)
    md5 = next(domain.dvc_md5 for domain in before.domains if domain.name == "legal")
    assert (record.step, record.parent.version) == (None, 4)
    assert record.withdrawn == (Withdrawn(name="legal", dvc_md5=md5),)
    assert record.withdraws == record.withdrawn[0]
    assert [(d.name, d.contribution_version) for d in record.domains] == [("code", 2), ("medical", 4)]
    assert record.perplexity.keys() == record.dense_perplexity.keys() == {"code", "medical"}
    assert record.perplexity_before is None
    assert record.weights_back > 0
    assert [row.version for row in record.matrix] == [2, 3, 4, None]
    assert version.tags["copal.withdrawn"] == "legal"
    assert not {"copal.domain", "copal.dvc_md5", "copal.git_rev"} & version.tags.keys()
    assert not list(lineage.workspace.runs.iterdir())
    no_damage(lineage)
    (entry,) = told(lineage)
    assert (entry.kind, entry.version, entry.why) == ("withdrawal", 5, "the licence ended")
    assert entry.details == WithdrawalDetails(domain="legal", dvc_md5=md5)

    expected, found = never(lineage, "code", "medical"), weights(lineage, 5)
    assert other_masks(found, expected) <= 1e-4
    assert all(torch.equal(found[name], expected[name]) for name in expected)  # the same order: not a bit differs
    assert other_masks(found, weights(lineage, 4)) > 0.01


@pytest.mark.soak
def test_it_runs_in_several_processes_too(lineage):
    lineage.set("model: {name: tiny", "model: {processes: 2, name: tiny")
    assert withdraw(lineage, "legal").made.number == 5
    lineage.set("processes: 2, ", "")
    assert other_masks(weights(lineage, 5), never(lineage, "code", "medical")) <= 1e-4


def test_the_watcher_does_not_bring_it_back_another_version_does(lineage):
    withdraw(lineage, "legal")
    found = plan(lineage.project)
    assert found.pending == ()
    assert [note for note in found.notes if "data/legal at" in note and "was withdrawn; it comes back only" in note]
    step_number = lineage.registry.head().number
    assert withdraw(lineage, "legal").made is None  # nothing to do
    assert lineage.registry.head().number == step_number
    lineage.commit("legal", 7)
    assert pending(lineage) == ["legal"]
    assert step(lineage, "legal") == 6
    record = lineage.registry.record(lineage.registry.head())
    assert [domain.name for domain in record.domains] == ["code", "legal", "medical"]
    assert pending(lineage) == []
    lineage.commit("legal", 1)  # the pointer goes back to what was withdrawn, and that is still not wanted
    assert pending(lineage) == []
    assert withdraw(lineage, "legal").made.number == 7
    assert [entry.name for entry in lineage.registry.record(lineage.registry.head()).withdrawn] == ["legal"] * 2


def test_adapt_brings_it_back_and_the_tombstone_goes(lineage):
    withdraw(lineage, "medical")
    assert step(lineage, "medical") == 6
    found, expected = weights(lineage, 6), weights(lineage, 4)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert lineage.registry.record(lineage.registry.head()).withdrawn == ()
    assert pending(lineage) == []


def test_steps_after_it_work_with_sums_dropped_and_after_a_purge(lineage):
    withdraw(lineage, "code", purge=True)
    collect(lineage.project)
    shutil.rmtree(lineage.registry.folder(lineage.registry.head()) / "state" / "sum")  # as if the head had been dropped
    lineage.commit("prose", 9)
    assert step(lineage, "prose") == 6
    found, expected = weights(lineage, 6), never(lineage, "legal", "medical", "prose")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_two_withdrawals_leave_two_tombstones(lineage):
    withdraw(lineage, "code")
    withdraw(lineage, "medical", why="they asked for it")
    record = lineage.registry.record(lineage.registry.head())
    assert [entry.name for entry in record.withdrawn] == ["code", "medical"]
    assert [domain.name for domain in record.domains] == ["legal"]
    assert weights(lineage, 6).keys() == weights(lineage, 3).keys()
    assert kinds(lineage) == [("withdrawal", 5), ("withdrawal", 6)]
    with pytest.raises(WithdrawError, match=r"legal is the only domain of version 6: .* the dense base, version 1"):
        withdraw(lineage, "legal")


def test_what_cannot_be_withdrawn_is_refused_and_nothing_changes(lineage):
    before, versions = lineage.snapshot(), lineage.registry.versions()
    for domain, why, error, match in (
        ("prose", "x", WithdrawError, "version 4 of tiny does not know prose; it knows code, legal, medical"),
        ("code", "  ", WithdrawError, "say why code is withdrawn"),
        ("code", "x" * 1001, WithdrawError, "1 to 1000 characters"),
        ("Code!", "x", DataError, "cannot name a domain"),
    ):
        with pytest.raises(error, match=match):
            withdraw(lineage, domain, why)
    assert lineage.snapshot() == before
    assert lineage.registry.versions() == versions
    lineage.set("name: tiny", "name: other")
    with pytest.raises(NoBaseError):
        withdraw(lineage, "code")


def test_a_run_that_ended_half_way_is_gone_on_with(lineage, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("flows.registry.publish.log_results", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            withdraw(lineage, "legal")
    assert lineage.registry.head().number == 4
    (left,) = lineage.workspace.runs.iterdir()
    assert sorted(path.name for path in left.iterdir()) == ["evaluation.json", "step.json", "version"]
    monkeypatch.setattr(run, "prune_domain", lambda *args: 1 / 0)  # it is not pruned again
    assert withdraw(lineage, "legal").made.number == 5
    assert kinds(lineage) == [("withdrawal", 5)]


def test_a_log_entry_that_a_kill_prevented_is_made_by_the_next_one_who_holds_the_lineage(lineage, monkeypatch):
    with monkeypatch.context() as patch:
        real = run.complete_log
        patch.setattr(run, "complete_log", lambda it: 1 / 0 if it.registry.head().withdrawn else real(it))
        with pytest.raises(ZeroDivisionError):
            withdraw(lineage, "legal", "privacy")
    assert lineage.registry.head().number == 5
    assert kinds(lineage) == []
    with hold_lineage(lineage.project, "anything") as claim:
        finish(lineage.project, claim, plain_tasks().gates)
        assert kinds(lineage) == [("withdrawal", 5)]
    assert told(lineage)[0].why == "privacy"
    withdraw(lineage, "code")
    assert kinds(lineage) == [("withdrawal", 5), ("withdrawal", 6)]


def test_a_purge_deletes_what_is_kept_of_the_data_and_names_the_versions_with_traces(lineage):
    lineage.commit("legal", 7)  # another version of its data
    step(lineage, "legal")
    cache, runs = lineage.workspace.cache, lineage.workspace.runs
    lineage.commit("legal", 8)  # data that no version comes of, and a step that waits with its statistics
    broken = replace(plain_tasks(), evaluate=lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_step(lineage.project, "legal", None, broken)
    assert len(list(runs.iterdir())) == 1
    of_node = lineage.workspace.nodes / "1" / "tiny-killed"
    left = (cache / f".{'0' * 32}.dir.partial", cache / "verify-killed", runs / "replay-killed", of_node)
    for folder in left:
        (folder / "files").mkdir(parents=True)
    md5s = {entry.dvc_md5 for number in (3, 5) for entry in lineage.registry.record(
        lineage.registry.version(number)).domains if entry.name == "legal"}  # fmt: skip
    assert len(md5s) == 2
    assert all((lineage.workspace.cache / md5).is_dir() for md5 in md5s)
    done = withdraw(lineage, "legal", purge=True)
    assert (done.purged.deleted, done.purged.traces) == ((3, 5), (3, 4, 5))
    assert done.purged.size > 0
    assert not any((lineage.workspace.cache / md5).exists() for md5 in md5s)
    assert not any(folder.exists() for folder in left)
    assert not list(runs.iterdir())
    head = lineage.registry.record(lineage.registry.head())
    assert {path.name for path in cache.glob("*.dir")} <= {domain.dvc_md5 for domain in head.domains}
    for version in lineage.registry.versions():
        state = lineage.registry.folder(version) / "state"
        contribution, total = (sorted((state / part).glob("*")) for part in ("contribution", "sum"))
        assert bool(contribution) == (version.number in (2, 4))
        assert bool(total) == (version.number in (2, 6))
        assert version.contribution_dropped == (version.number in (3, 5))
    no_damage(lineage)
    withdrawal, purge = told(lineage)
    assert (withdrawal.kind, purge.kind, purge.why) == ("withdrawal", "purge", "the licence ended")
    md5 = withdrawal.details.dvc_md5
    assert purge.details == PurgeDetails(domain="legal", dvc_md5=md5, deleted=(3, 5), traces=(3, 4, 5))
    withdraw(lineage, "legal", purge=True)  # again: nothing is there to purge, and it is not told twice
    assert len(told(lineage)) == 2
    lineage.commit("code", 8)
    assert step(lineage, "code") == 7  # reads contributions of the others


@pytest.mark.parametrize(
    ("target", "nth"),
    [
        ("flows.registry.registry.Registry.drop_contribution", 1),
        ("shutil.rmtree", 3),
        ("flows.ledger.Ledger.append", 1),
    ],
)
def test_a_purge_that_was_killed_is_completed_by_the_next(lineage, monkeypatch, target, nth):
    lineage.commit("legal", 7)
    step(lineage, "legal")
    withdraw(lineage, "legal")
    with monkeypatch.context() as patch:
        calls, real = iter(range(1, 100)), pkgutil.resolve_name(target)
        patch.setattr(target, lambda *args, **options: 1 / 0 if next(calls) == nth else real(*args, **options))
        with pytest.raises(ZeroDivisionError):
            withdraw(lineage, "legal", purge=True)
    no_damage(lineage)
    assert kinds(lineage) == [("withdrawal", 6)]
    done = withdraw(lineage, "legal", purge=True)
    assert (done.made, done.purged.deleted, done.purged.traces) == (None, (3, 5), (3, 4, 5))
    for version in lineage.registry.versions():
        left = list((lineage.registry.folder(version) / "state" / "contribution").glob("*"))
        assert bool(left) == (version.number in (2, 4))
    no_damage(lineage)
    assert kinds(lineage) == [("withdrawal", 6), ("purge", None)]


def test_a_domain_that_was_withdrawn_earlier_can_be_purged(lineage):
    withdraw(lineage, "legal")
    lineage.commit("prose", 9)
    step(lineage, "prose")
    done = withdraw(lineage, "legal", "privacy", purge=True)
    assert done.made is None
    assert (done.purged.deleted, done.purged.traces) == ((3,), (3, 4))
    assert kinds(lineage) == [("withdrawal", 5), ("purge", None)]
    assert lineage.registry.head().number == 6


def test_a_contribution_that_is_missing_without_a_purge_is_damage(lineage):
    version = lineage.registry.version(4)
    folder = lineage.registry.folder(version)
    shutil.rmtree(folder / "state" / "contribution")
    record = lineage.registry.record(version)
    assert "missing: state/contribution/block-00000.safetensors" in verify_files(record, folder, sum_dropped=True)
    with pytest.raises(StateError, match=r"contribution/block-00000\.safetensors cannot be read"):
        withdraw(lineage, "legal")
    assert lineage.registry.head().number == 4
    assert kinds(lineage) == []


@pytest.mark.usefixtures("by_hand")
def test_the_command_withdraws_and_says_so(lineage, capsys):
    arguments = ["--workspace", str(lineage.root)]
    assert main(["withdraw", "legal", *arguments]) == 2  # no reason
    assert "--why" in capsys.readouterr().err
    assert main(["withdraw", "legal", "--why", "the licence ended", "--purge", *arguments]) == 0
    out = capsys.readouterr().out
    assert "version 5 of tiny: withdrew legal" in out
    assert "purged legal: its contribution (version 3)" in out
    assert "traces of legal stay in the weights of version 3, 4\n" in out
    assert "problem" not in out
    found = status(lineage.project)
    assert [version["withdrawn"] for version in found["versions"]] == [None, None, None, None, "legal"]
    assert main(["withdraw", "legal", "--why", "again", *arguments]) == 0
    assert capsys.readouterr().out == "nothing to do: version 5 of tiny is without legal already\n"
    assert main(["withdraw", "prose", "--why", "again", *arguments]) == 2
    assert "does not know prose" in capsys.readouterr().err
    assert main(["watch", "--once", *arguments]) == 0
    assert "was withdrawn; it comes back only" in capsys.readouterr().out
    assert len(lineage.registry.versions()) == 5
