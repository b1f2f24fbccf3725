"""Who serves: promotions and rollbacks by the log, and what somebody moved by hand is not passed over."""

from __future__ import annotations

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from copal.errors import CopalError
from flows.cache import Cache
from flows.cli import main
from flows.gates import champion as module
from flows.gates.champion import PromotionError, judged, make_champion, restore_champion, settle
from flows.ledger import ClaimLostError, Ledger
from flows.lineage.entries import Entry, GateResult, GatesDetails, MoveEntry, champions, next_entry
from flows.project import Project, append_log, hold_lineage, read_log
from flows.registry.errors import AliasMovedError
from flows.registry.registry import Registry
from flows.registry.versions import ModelVersion
from flows.settings import ModelSettings, Settings
from flows.step.run import plain_tasks, run_step
from flows.workspace import Workspace
from support.histories import ADA, MOVED
from support.registries import a_record, a_registry, staged
from support.toys import expire_claims, step

SETTINGS = Settings(model=ModelSettings(name="tiny"))


@pytest.fixture
def project(tmp_path: Path, mlflow_template: Path) -> Project:
    """The dense base, versions 2 to 4 whose gates passed, and 5 whose gates failed; 6 has not gone through them."""
    shutil.copy(mlflow_template, tmp_path / "mlflow.db")
    registry = a_registry(tmp_path)
    made = Project(
        Workspace(tmp_path), SETTINGS, registry, Ledger(f"sqlite:///{tmp_path}/ledger.db", "tiny"), Cache(tmp_path)
    )
    for number in range(1, 7):
        folder, parent = staged(tmp_path / str(number), str(number)), registry.head()
        record = a_record(folder, parent, [f"{letter}omain" for letter in "abcdef"[: number - 1]])
        head = parent.number if parent else None
        version = registry.register(folder, record, parent=parent, expected_head=head)
        if 1 < number < 6:
            append_log(made, "gates", version=number, details=results_of(version, number < 5))
    return made


def results_of(version: ModelVersion, passed: bool) -> GatesDetails:
    gates = (GateResult(name="dense", passed=passed, value=1.5, limit=2.0, detail="fine"),)
    return GatesDetails(record=version.digest, passed=passed, promote="manual", gates=gates)


def opened_anew(project: Project) -> Project:
    """As another process sees it."""
    store = a_registry(project.workspace.root, project.registry.model_name)
    return replace(project, registry=store, ledger=Ledger(project.ledger.uri, project.ledger.lineage))


def named_by(project: Project, alias: str) -> int | None:
    """The version that an alias names now."""
    return opened_anew(project).registry.alias(alias)


def by_hand(project: Project, alias: str, number: int) -> None:
    uri = project.registry.tracking_uri
    MlflowClient(tracking_uri=uri, registry_uri=uri).set_registered_model_alias("tiny", alias, str(number))


def moves(project: Project) -> list[tuple]:
    kinds = ("promotion", "rollback")
    return [(e.kind, e.from_version, e.to_version) for e in read_log(opened_anew(project)) if e.kind in kinds]


def test_rollback_goes_back_again_and_again(project):
    with pytest.raises(PromotionError, match="nothing to go back to"):
        restore_champion(project)
    for number in (1, 2, 4):
        make_champion(project, number, why=f"try {number}")
    assert make_champion(project, 4) is None
    restore_champion(project, why="4 is slow")
    assert named_by(project, "champion") == 2
    restore_champion(project)
    assert named_by(project, "champion") == 1
    with pytest.raises(PromotionError, match="nothing to go back to"):
        restore_champion(project)
    make_champion(project, 3)
    restore_champion(project)
    assert named_by(project, "champion") == 1
    assert moves(project) == [
        ("promotion", None, 1), ("promotion", 1, 2), ("promotion", 2, 4), ("rollback", 4, 2), ("rollback", 2, 1),
        ("promotion", 1, 3), ("rollback", 3, 1),
    ]  # fmt: skip
    assert next(e.why for e in read_log(opened_anew(project)) if e.kind == "rollback") == "4 is slow"


@pytest.mark.parametrize(
    ("number", "says"), [(5, r"failed its gates \(dense\)"), (6, "has not gone through its gates")]
)
def test_a_version_without_passed_gates_needs_force_and_a_reason(project, number, says):
    with pytest.raises(PromotionError, match=says):
        make_champion(project, number, why="please")
    with pytest.raises(PromotionError, match="add --why"):
        make_champion(project, number, force=True)
    with pytest.raises(PromotionError, match="add --why"):
        make_champion(project, number, force=True, why="  ")
    assert (named_by(project, "champion"), moves(project)) == (None, [])
    entry = make_champion(project, number, force=True, why="the customer waits")
    assert (entry.details.forced, entry.why, named_by(project, "champion")) == (
        True,
        "the customer waits",
        number,
    )


def test_an_alias_moved_by_hand_is_noticed(project):
    make_champion(project, 2)
    make_champion(project, 3)
    by_hand(project, "champion", 2)  # where it was before: no sign of a killed promotion either
    for move in (lambda: make_champion(project, 4), lambda: restore_champion(project)):
        with pytest.raises(AliasMovedError, match="names version 2, the log says version 3"):
            move()
    assert named_by(project, "champion") == 2
    make_champion(project, 4, force=True, why="it was me")
    assert moves(project)[-1] == ("promotion", 2, 4)
    restore_champion(project)
    assert named_by(project, "champion") == 2
    by_hand(project, "champion", 6)
    restore_champion(project, force=True, why="who did that?")
    assert moves(project)[-1] == ("rollback", 6, 2)


class KilledError(Exception):
    """In place of kill -9; `test_crash.py` has the real one."""


@pytest.mark.parametrize("place", ["alias", "ledger"])
@pytest.mark.parametrize("step", ["promote", "rollback"])
def test_a_move_that_was_killed_is_made_by_the_next(project, monkeypatch, place, step):
    make_champion(project, 2)
    make_champion(project, 3)

    def killed(*_):
        raise KilledError

    owner, name = {"alias": (MlflowClient, "set_registered_model_alias"), "ledger": (Ledger, "settle")}[place]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killed)
        with pytest.raises(KilledError):
            make_champion(project, 4) if step == "promote" else restore_champion(project)
    wanted = 4 if step == "promote" else 2
    assert named_by(project, "champion") == (3 if place == "alias" else wanted)
    project = opened_anew(project)
    settle(project, read_log(project))
    assert named_by(project, "champion") == wanted
    by_hand(project, "champion", 3)  # now that it is settled, this is a hand's
    project = opened_anew(project)
    settle(project, read_log(project))
    assert named_by(project, "champion") == 3


def test_of_promotions_at_the_same_time_one_wins_and_the_other_is_told(project, monkeypatch):
    both, real = threading.Barrier(2), module.hold_aliases

    def together(*args):
        both.wait(60)  # both have looked, none has moved
        return real(*args)

    monkeypatch.setattr(module, "hold_aliases", together)

    def work(number: int) -> object:
        try:
            return make_champion(opened_anew(project), number)
        except CopalError as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(work, (2, 3)))
    (error,) = [one for one in found if isinstance(one, AliasMovedError)]
    (entry,) = [one for one in found if isinstance(one, MoveEntry)]
    assert f"was moved to version {entry.to_version} in the meantime by" in str(error)
    assert moves(project) == [("promotion", None, entry.to_version)]
    assert named_by(project, "champion") == entry.to_version


def test_an_alias_is_not_moved_from_where_it_is_not(project):
    by_hand(project, "champion", 3)
    with pytest.raises(AliasMovedError, match="names version 3, not 2"):
        opened_anew(project).registry.move_alias("champion", 4, expected=2)
    assert named_by(project, "champion") == 3


def test_a_rollback_does_not_wait_for_a_step_that_runs(project):
    make_champion(project, 2)
    make_champion(project, 3)
    with hold_lineage(project, "a step of six hours") as claim:
        restore_champion(opened_anew(project), why="3 talks nonsense")
        assert named_by(project, "champion") == 2
        claim.check()


def test_a_promoter_that_was_paused_logs_no_move_when_others_have_moved(project, monkeypatch):
    make_champion(project, 1)
    real = Ledger.append

    def late(self, *args, **details):
        """Paused before its entry: its claim passes, and another promotion goes through."""
        monkeypatch.setattr(Ledger, "append", real)
        expire_claims(project)
        make_champion(opened_anew(project), 3)
        return real(self, *args, **details)

    monkeypatch.setattr(Ledger, "append", late)
    with pytest.raises((AliasMovedError, ClaimLostError)):
        make_champion(project, 2)
    assert moves(project) == [("promotion", None, 1), ("promotion", 1, 3)]
    assert named_by(project, "champion") == 3


def judge_again(project: Project, number: int, passed: bool) -> Entry:
    version = project.registry.version(number)
    entry = judged(project, version, results_of(version, passed), read_log(project))
    settle(project, read_log(project))
    return entry


def test_gates_that_ran_again_and_were_killed_are_shown_by_the_next(make_learnt_bench, tmp_path, monkeypatch, capsys):
    bench = make_learnt_bench(tmp_path / "workspace")
    step(bench)
    bench.set("model: {name: tiny", "gates: {dense: 1.0001}\nmodel: {name: tiny")
    with monkeypatch.context() as patch:
        patch.setattr(Registry, "show_gates", lambda *args: 1 / 0)
        assert main(["gates", "2", "--again", "--workspace", str(bench.root)]) == 1
    assert "unexpected ZeroDivisionError" in capsys.readouterr().err
    assert bench.registry.version(2).gates == "passed"
    step(bench, "legal")
    assert bench.registry.version(2).gates == "failed"
    assert bench.registry.version(2).log_entry == 2


def test_the_newest_version_that_passes_is_the_challenger_also_when_judged_again(project):
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
        before = named_by(project, "challenger")
        entry = judge_again(project, number, passed)
        assert named_by(project, "challenger") == challenger, (number, passed)
        moved = (before, challenger) if before != challenger else (None, None)
        assert (entry.from_version, entry.to_version) == moved
    with pytest.raises(PromotionError, match=r"version 2 of .* failed its gates"):
        make_champion(project, 2)


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
    by_hand(bench.project, "champion", 1)
    made = run_step(bench.project, "legal", None, plain_tasks())
    assert made.version.number == bench.registry.alias("challenger") == 3
    assert bench.registry.alias("champion") == 1
    client = MlflowClient(bench.registry.tracking_uri)
    run = client.get_run(bench.registry.head().run_id)
    assert run.data.metrics["gate.lineage.passed"] == 1
    assert run.data.metrics["gate.dense"] < 2
    assert json.loads(run.data.tags["mlflow.loggedArtifacts"]) == [{"path": "gates.json", "type": "table"}]
    shown = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert shown == {"gates.json", "lineage.html"}, "registry.pictures is false"
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
    restore_champion(bench.project, why="3 talks nonsense")
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
