"""Who serves: promotions and rollbacks by the log, and what somebody moved by hand is not passed over."""

from __future__ import annotations

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mlflow import MlflowClient
from test_registry import a_record, a_registry, staged
from toys import step

from copal.errors import CopalError
from flows.cli import main
from flows.gates import champion as module
from flows.gates.champion import PromotionError, judged, promote, rollback, settle
from flows.lineage.entries import Entry, GateResult, GatesDetails, MoveEntry, champions, next_entry
from flows.registry.claims import ClaimLostError, claimed
from flows.registry.registry import AliasMovedError, ModelVersion, Registry
from flows.settings import Settings
from flows.step.run import plain_tasks, run_step
from tests.flows.histories import ADA, MOVED

SETTINGS = Settings()


@pytest.fixture
def registry(tmp_path: Path, mlflow_template: Path) -> Registry:
    """The dense base, versions 2 to 4 whose gates passed, and 5 whose gates failed; 6 has not gone through them."""
    shutil.copy(mlflow_template, tmp_path / "mlflow.db")
    made = a_registry(tmp_path)
    for number in range(1, 7):
        folder, parent = staged(tmp_path / str(number), str(number)), made.head()
        record = a_record(folder, parent, [f"{letter}omain" for letter in "abcdef"[: number - 1]])
        head = parent.number if parent else None
        version = made.register(folder, record, metrics=[], parent=parent, expected_head=head)
        if 1 < number < 6:
            details = results_of(version, number < 5)
            made.append_log("gates", version=number, details=details)
    return made


def results_of(version: ModelVersion, passed: bool) -> GatesDetails:
    gates = (GateResult(name="dense", passed=passed, value=1.5, limit=2.0, detail="fine"),)
    return GatesDetails(record=version.tags["copal.lineage_digest"], passed=passed, promote="manual", gates=gates)


def by_hand(registry: Registry, alias: str, number: int) -> None:
    client = MlflowClient(tracking_uri=registry.tracking_uri, registry_uri=registry.tracking_uri)
    client.set_registered_model_alias(registry.model_name, alias, str(number))


def moves(registry: Registry) -> list[tuple]:
    kinds = ("promotion", "rollback")
    return [(e.kind, e.from_version, e.to_version) for e in registry.log() if e.kind in kinds]


def test_rollback_goes_back_again_and_again(registry):
    with pytest.raises(PromotionError, match="nothing to go back to"):
        rollback(registry, SETTINGS)
    for number in (1, 2, 4):
        promote(registry, SETTINGS, number, why=f"try {number}")
    assert promote(registry, SETTINGS, 4) is None
    rollback(registry, SETTINGS, why="4 is slow")
    assert registry.alias("champion") == 2
    rollback(registry, SETTINGS)
    assert registry.alias("champion") == 1
    with pytest.raises(PromotionError, match="nothing to go back to"):
        rollback(registry, SETTINGS)
    promote(registry, SETTINGS, 3)
    rollback(registry, SETTINGS)
    assert registry.alias("champion") == 1
    assert moves(registry) == [
        ("promotion", None, 1), ("promotion", 1, 2), ("promotion", 2, 4), ("rollback", 4, 2), ("rollback", 2, 1),
        ("promotion", 1, 3), ("rollback", 3, 1),
    ]  # fmt: skip
    assert next(e.why for e in registry.log() if e.kind == "rollback") == "4 is slow"


@pytest.mark.parametrize(
    ("number", "says"), [(5, r"failed its gates \(dense\)"), (6, "has not gone through its gates")]
)
def test_a_version_without_passed_gates_needs_force_and_a_reason(registry, number, says):
    with pytest.raises(PromotionError, match=says):
        promote(registry, SETTINGS, number, why="please")
    with pytest.raises(PromotionError, match="add --why"):
        promote(registry, SETTINGS, number, force=True)
    with pytest.raises(PromotionError, match="add --why"):
        promote(registry, SETTINGS, number, force=True, why="  ")
    assert (registry.alias("champion"), moves(registry)) == (None, [])
    entry = promote(registry, SETTINGS, number, force=True, why="the customer waits")
    assert (entry.details.forced, entry.why, registry.alias("champion")) == (
        True,
        "the customer waits",
        number,
    )


def test_an_alias_moved_by_hand_is_noticed(registry):
    promote(registry, SETTINGS, 2)
    promote(registry, SETTINGS, 3)
    by_hand(registry, "champion", 2)  # where it was before: no sign of a killed promotion either
    for move in (lambda: promote(registry, SETTINGS, 4), lambda: rollback(registry, SETTINGS)):
        with pytest.raises(AliasMovedError, match="names version 2, the log says version 3"):
            move()
    assert registry.alias("champion") == 2
    promote(registry, SETTINGS, 4, force=True, why="it was me")
    assert moves(registry)[-1] == ("promotion", 2, 4)
    rollback(registry, SETTINGS)
    assert registry.alias("champion") == 2
    by_hand(registry, "champion", 6)
    rollback(registry, SETTINGS, force=True, why="who did that?")
    assert moves(registry)[-1] == ("rollback", 6, 2)


class KilledError(Exception):
    """In place of kill -9; `test_crash.py` has the real one."""


@pytest.mark.parametrize("place", ["alias", "tag"])
@pytest.mark.parametrize("step", ["promote", "rollback"])
def test_a_move_that_was_killed_is_made_by_the_next(registry, monkeypatch, place, step):
    promote(registry, SETTINGS, 2)
    promote(registry, SETTINGS, 3)

    def killed(*_):
        raise KilledError

    name = {"alias": "set_registered_model_alias", "tag": "set_registered_model_tag"}[place]
    real = getattr(MlflowClient, name)
    only = {"alias": "champion", "tag": "copal.moved.champion"}[place]
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, name, lambda self, *a: killed() if only in a else real(self, *a))
        with pytest.raises(KilledError):
            promote(registry, SETTINGS, 4) if step == "promote" else rollback(registry, SETTINGS)
    wanted = 4 if step == "promote" else 2
    assert registry.alias("champion") == (3 if place == "alias" else wanted)
    settle(registry, registry.log())
    assert registry.alias("champion") == wanted
    by_hand(registry, "champion", 3)  # now that it is settled, this is a hand's
    settle(registry, registry.log())
    assert registry.alias("champion") == 3


def test_of_promotions_at_the_same_time_one_wins_and_the_other_is_told(registry, monkeypatch):
    both, real = threading.Barrier(2), module.claimed

    def together(*args, **kwargs):
        both.wait(60)  # both have looked, none has moved
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "claimed", together)

    def work(number: int) -> object:
        mine = Registry(registry.tracking_uri, registry.artifact_root, registry.model_name, registry.cache)
        try:
            return promote(mine, SETTINGS, number)
        except CopalError as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(work, (2, 3)))
    (error,) = [one for one in found if isinstance(one, AliasMovedError)]
    (entry,) = [one for one in found if isinstance(one, MoveEntry)]
    assert f"was moved to version {entry.to_version} in the meantime by" in str(error)
    assert moves(registry) == [("promotion", None, entry.to_version)]
    assert registry.alias("champion") == entry.to_version


def test_a_move_looks_at_the_alias_once_more(registry):
    by_hand(registry, "champion", 3)
    with pytest.raises(AliasMovedError, match="names version 3, not 2"):
        registry.move_alias("champion", 4, expected=2, entry=9)
    assert (registry.alias("champion"), registry.moved_by("champion")) == (3, 0)


def test_a_rollback_does_not_wait_for_a_step_that_runs(registry):
    promote(registry, SETTINGS, 2)
    promote(registry, SETTINGS, 3)
    with claimed(registry, "a step of six hours", lease=60) as claim:
        rollback(registry, SETTINGS, why="3 talks nonsense")
        assert registry.alias("champion") == 2
        claim.check()


def test_a_promoter_that_was_paused_logs_no_move_when_others_have_moved(registry, monkeypatch):
    promote(registry, SETTINGS, 1)
    real = Registry.append_log

    def late(self, *args, **details):
        """Paused before its entry: its claim passes, and another promotion goes through."""
        monkeypatch.setattr(Registry, "append_log", real)
        registry.change_entry("alias-claim", max(registry.entries("alias-claim")), {"expires": "0"})
        promote(registry, SETTINGS, 3)
        return real(self, *args, **details)

    monkeypatch.setattr(Registry, "append_log", late)
    with pytest.raises((AliasMovedError, ClaimLostError)):
        promote(registry, SETTINGS, 2)
    assert moves(registry) == [("promotion", None, 1), ("promotion", 1, 3)]
    assert registry.alias("champion") == 3


def judge_again(registry: Registry, number: int, passed: bool) -> Entry:
    version = registry.version(number)
    entry = judged(registry, version, results_of(version, passed), registry.log())
    settle(registry, registry.log())
    return entry


def test_gates_that_ran_again_and_were_killed_are_shown_by_the_next(make_learnt_bench, tmp_path, monkeypatch):
    bench = make_learnt_bench(tmp_path / "workspace")
    step(bench)
    bench.set("model: {name: tiny", "gates: {dense: 1.0001}\nmodel: {name: tiny")
    with monkeypatch.context() as patch:
        patch.setattr(Registry, "conclude", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(["gates", "2", "--again", "--workspace", str(bench.root)])
    assert bench.registry.version(2).gates == "passed"
    step(bench, "legal")
    assert bench.registry.version(2).gates == "failed"
    assert bench.registry.version(2).log_entry == 2


def test_the_newest_version_that_passes_is_the_challenger_also_when_judged_again(registry):
    for number, passed, challenger in (
        (3, True, 3),
        (2, True, 3),  # an older one
        (5, False, 3),
        (3, False, 4),  # the challenger fails: the newest of those that passed
        (6, True, 6),
        (6, False, 4),
        (4, False, 2),
        (2, False, None),
        (5, True, 5),
    ):
        before = registry.alias("challenger")
        entry = judge_again(registry, number, passed)
        assert registry.alias("challenger") == challenger, (number, passed)
        moved = (before, challenger) if before != challenger else (None, None)
        assert (entry.from_version, entry.to_version) == moved
    with pytest.raises(PromotionError, match=r"version 2 of .* failed its gates"):
        promote(registry, SETTINGS, 2)


def test_champions_by_the_log():
    def entry(kind: str, before: int | None, to: int) -> Entry:
        judged = GatesDetails(record="0" * 64, passed=True, promote="manual", gates=())
        details = MOVED if kind == "promotion" else judged
        return next_entry((), kind=kind, who=ADA, version=to, from_version=before, to_version=to, details=details)

    assert champions([]) == []
    assert champions([entry("gates", None, 2)]) == []
    assert champions([entry("promotion", None, 2), entry("promotion", 2, 3), entry("promotion", 3, 2)]) == [2, 3, 2]
    assert champions([entry("promotion", None, 2), entry("promotion", 5, 3)]) == [2, 5, 3]  # 5 by hand


def test_the_command_line_promotes_and_rolls_back(make_learnt_bench, tmp_path, capsys):
    bench = make_learnt_bench(tmp_path / "workspace")
    for domain in ("code", "legal"):
        made = run_step(bench.project, domain, None, plain_tasks())
    assert bench.registry.alias("challenger") == made.number == 3
    here = ["--workspace", str(bench.root)]
    assert main(["promote", "2", *here]) == 0
    assert main(["promote", "challenger", "--why", "better", *here]) == 0
    assert "champion of tiny: version 3, before it version 2 (log entry 4)" in capsys.readouterr().out
    assert main(["promote", "3", *here]) == 0
    assert "nothing to do: version 3 of tiny is the champion" in capsys.readouterr().out
    assert bench.registry.head().aliases == ("challenger", "champion", "latest")
    assert main(["rollback", *here]) == 0
    assert main(["rollback", *here]) == 2
    assert "nothing to go back to" in capsys.readouterr().err
    assert main(["promote", "3", "--force", *here]) == 2
    assert "add --why" in capsys.readouterr().err


def test_auto_promotes_what_passed_and_leaves_a_hand_alone(make_learnt_bench, tmp_path):
    bench = make_learnt_bench(tmp_path / "workspace")
    bench.set("model: {name: tiny", "gates: {promote: auto}\nmodel: {name: tiny")
    run_step(bench.project, "code", None, plain_tasks())
    assert bench.registry.alias("champion") == 2
    by_hand(bench.registry, "champion", 1)
    made = run_step(bench.project, "legal", None, plain_tasks())
    assert made.version.number == bench.registry.alias("challenger") == 3
    assert bench.registry.alias("champion") == 1
    client = MlflowClient(bench.registry.tracking_uri)
    run = client.get_run(bench.registry.head().run_id)
    assert run.data.metrics["gate.lineage.passed"] == 1
    assert run.data.metrics["gate.dense"] < 2
    assert json.loads(run.data.tags["mlflow.loggedArtifacts"]) == [{"path": "gates.json", "type": "table"}]
    table = json.loads(Path(client.download_artifacts(run.info.run_id, "gates.json")).read_text())
    page = Path(client.download_artifacts(run.info.run_id, "lineage.html"))
    assert "<title>Lineage of tiny</title>" in page.read_text()
    assert table["columns"][:2] == ["name", "passed"]
    assert [row[:2] for row in table["data"]] == [[gate.name, True] for gate in made.gates]


def test_gates_that_run_again_do_not_undo_a_rollback(make_learnt_bench, tmp_path):
    bench = make_learnt_bench(tmp_path / "workspace")
    bench.set("model: {name: tiny", "gates: {promote: auto}\nmodel: {name: tiny")
    for domain in ("code", "legal"):
        step(bench, domain)
    assert bench.registry.alias("champion") == 3
    rollback(bench.registry, bench.settings, why="3 talks nonsense")
    assert main(["gates", "3", "--again", "--workspace", str(bench.root)]) == 0
    assert bench.registry.alias("champion") == 2
    assert bench.registry.alias("challenger") == 3


def test_gates_are_shown_and_run_again_with_the_limits_of_today(make_learnt_bench, tmp_path, capsys):
    bench = make_learnt_bench(tmp_path / "workspace")
    for domain in ("code", "legal"):
        step(bench, domain)
    here = ["--workspace", str(bench.root)]
    assert main(["gates", "latest", *here]) == 0
    shown = capsys.readouterr().out
    assert "gates of version 3" in shown
    assert "all passed" in shown
    bench.set("model: {name: tiny", "gates: {dense: 1.0001}\nmodel: {name: tiny")
    assert main(["gates", "3", "--again", *here]) == 1
    assert "dense" in capsys.readouterr().out
    assert bench.registry.alias("challenger") == 2
    assert bench.registry.version(3).gates == "failed"
    assert main(["promote", "3", *here]) == 2
    assert "failed its gates (dense)" in capsys.readouterr().err
    bench.set("gates: {dense: 1.0001}", "gates: {dense: 2.0}")
    assert main(["gates", "3", "--again", "--json", *here]) == 0
    assert json.loads(capsys.readouterr().out)["details"]["passed"]
    assert bench.registry.alias("challenger") == 3
    assert main(["promote", "3", *here]) == 0
    assert main(["gates", "1", *here]) == 2
    assert "dense base" in capsys.readouterr().err
