"""What an auditor asks: each question answered on histories made by hand, and each command on a real registry."""

from __future__ import annotations

import contextlib
import io
import json
import shutil

import pytest

from flows.cli import main
from flows.lineage.answers import data_in, diff, used, whose, worse
from flows.lineage.entries import GatesDetails
from flows.lineage.files import FolderFiles, file_digests
from flows.lineage.history import History, HistoryError, find_version
from flows.project import append_log
from flows.terminal.answers import render_answer
from flows.terminal.progress import console
from support.histories import MOVED, a_history, altered, logged, md5, three_domains


def shown(answer: dict) -> str:
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream):
        console().print(render_answer(answer))
    return stream.getvalue()


# --- used


def test_a_name_finds_every_dataset_of_the_domain_and_how_each_left():
    answer = used(three_domains(), "legal")
    assert answer["versions"] == [2, 3, 4, 5, 6]
    assert [(s["dvc_md5"], s["versions"], s["came_in"], s["left_in"], s["how"]) for s in answer["spells"]] == [
        (md5("legal", 1), [2, 3], 2, 4, "replaced"),
        (md5("legal", 2), [4, 5, 6], 4, None, None),
    ]
    assert "replaced in version 4" in shown(answer)
    assert "in the newest version" in shown(answer)


@pytest.mark.parametrize("text", [md5("code"), md5("code").removesuffix(".dir"), md5("code")[:8], md5("code").upper()])
def test_an_md5_finds_the_versions_that_hold_it(text):
    answer = used(three_domains(), text.replace(".DIR", ".dir"))
    (spell,) = answer["spells"]
    assert (spell["domain"], spell["versions"], spell["left_in"], spell["how"]) == ("code", [3, 4, 5], 6, "withdrawn")


@pytest.mark.parametrize("text", ["nothing", "0" * 32, md5("code")[:7], ""])
def test_a_dataset_that_no_version_holds(text):
    answer = used(three_domains(), text)
    assert (answer["versions"], answer["spells"]) == ([], [])
    assert "no version holds" in shown(answer)


def test_data_that_comes_back_has_a_spell_for_each_time():
    history = a_history([{"add": "a"}, {"withdraw": "a"}, {"add": "a"}, {"add": "b"}])
    assert [spell["versions"] for spell in used(history, "a")["spells"]] == [[2], [4, 5]]


# --- data_in


def test_the_data_of_the_champion_now():
    answer = data_in(three_domains())
    assert (answer["version"], answer["since"]) == (5, "2026-04-01T09:00:00+00:00")
    assert [domain["name"] for domain in answer["domains"]] == ["code", "legal", "med"]
    assert md5("legal", 2) in shown(answer)
    assert md5("legal", 1) not in shown(answer)


@pytest.mark.parametrize(
    ("on", "version", "moves"),
    [
        ("2026-02-28", None, 0),
        ("2026-03-01T08:59:59Z", None, 0),
        ("2026-03-01T09:00:00", 2, 0),
        ("2026-03-01", 2, 1),
        ("2026-03-05T09:30:00+00:00", 4, 0),
        ("2026-03-05T10:30:00+02:00", 2, 0),  # 08:30 UTC
        ("2026-03-05", 2, 2),
        ("2026-03-31", 2, 0),
        ("2026-04-01", 5, 1),
        ("9999-12-31", 5, 0),
    ],
)
def test_the_data_of_the_champion_on_a_date(on, version, moves):
    answer = data_in(three_domains(), on=on)
    assert (answer["version"], len(answer["moves"])) == (version, moves)
    assert bool(answer["domains"]) == (version is not None)
    assert ("none had been promoted" in shown(answer)) == (version is None)
    assert shown(answer).count("that day") == moves


def test_the_data_of_a_number_and_of_other_aliases():
    history = three_domains()
    assert data_in(history, "2")["domains"][0]["dvc_md5"] == md5("legal", 1)
    answer = data_in(history, "latest")
    assert answer["withdrawn"] == [{"name": "code", "dvc_md5": md5("code")}]
    assert "withdrawn: code" in shown(answer)
    assert data_in(history, "challenger")["version"] == 6
    assert data_in(history, "challenger", "2026-05-01")["version"] is None  # the log tells of no move of it
    assert data_in(history, "latest", "2026-01-01T02:30:00Z")["version"] == 3
    assert data_in(history, "1")["domains"] == []
    assert "dense base" in shown(data_in(history, "1"))


def test_gate_results_move_the_challenger_and_no_champion():
    history = a_history([{"add": "a"}, {"add": "b"}])
    for day, version, before, to in ((1, 2, None, 2), (2, 3, None, None), (3, 2, 2, None)):
        details = GatesDetails(record="0" * 64, passed=True, promote="manual", gates=())
        entry = {"version": version, "from_version": before, "to_version": to, "details": details}
        history = logged(history, "gates", f"2026-03-0{day}T00:00:00+00:00", **entry)
    named = [data_in(history, "challenger", f"2026-03-0{day}")["version"] for day in (1, 2, 3)]
    assert named == [2, 2, None]
    assert data_in(history, on="2026-04-01")["version"] is None


@pytest.mark.parametrize("on", ["yesterday", "2026-02-30", "", "2026-01-01T25:00:00"])
def test_what_is_no_date_is_refused(on):
    with pytest.raises(HistoryError, match="is no date; write 2026-01-31"):
        data_in(three_domains(), on=on)


def test_unknown_versions_and_aliases_are_refused():
    with pytest.raises(HistoryError, match=r"no version or alias '7'; there are: 1, 2, 3, 4, 5, 6, challenger"):
        data_in(three_domains(), "7")
    with pytest.raises(HistoryError, match="tells no moves of '3'"):
        data_in(three_domains(), "3", "2026-04-01")
    with pytest.raises(HistoryError, match="no versions yet"):
        data_in(History(model="tiny", versions=(), log=()))


# --- diff


def test_what_changed_between_two_versions():
    answer = diff(three_domains(), "3", "champion")
    assert (answer["a"], answer["b"]) == (3, 5)
    assert answer["domains"] == {
        "added": [{"domain": "med", "dvc_md5": md5("med")}],
        "removed": [],
        "replaced": [{"domain": "legal", "a": md5("legal", 1), "b": md5("legal", 2)}],
        "reweighted": [],
    }
    changed = {section: changes for section, changes in answer["changes"].items() if changes}
    assert changed == {
        "settings": [{"name": "calibration.windows", "a": 24, "b": 32}],
        "libraries": [{"name": "torch", "a": "2.13.0", "b": "2.14.0"}],
    }
    code, legal, med = answer["perplexity"]
    assert code == {"domain": "code", "a": 8.0, "b": 8.2, "change": pytest.approx(0.025), "comparable": True}
    assert (legal["change"], legal["comparable"]) == (None, False)  # other data, other tokens
    assert (med["a"], med["b"], med["change"]) == (None, 7.0, None)
    assert answer["files"] == {"same": 1, "changed": 2, "added": 0, "removed": 0}
    assert len(answer["changed_files"]) == sum(part["files"] for part in answer["parts"]) == 2
    text = shown(answer)
    assert "other tokens" in text
    assert all(part["part"] in text for part in answer["parts"])
    assert "+2.5%" in text
    assert md5("med") in text


def test_the_way_back_is_the_mirror_image():
    there, back = diff(three_domains(), "5", "6"), diff(three_domains(), "6", "5")
    assert there["domains"]["removed"] == back["domains"]["added"] == [{"domain": "code", "dvc_md5": md5("code")}]
    assert diff(three_domains(), "4", "4")["domains"] == {"added": [], "removed": [], "replaced": [], "reweighted": []}


# --- worse


def test_which_domain_got_worse_when_and_by_which_step():
    answer = worse(three_domains())
    assert [(d["domain"], d["newest_in"], d["version"], round(d["change"], 3)) for d in answer["domains"]] == [
        ("legal", 2, 3, 0.1),
        ("legal", 4, 6, 0.1),
        ("code", 3, 5, 0.025),
        ("med", 5, 6, -0.014),
    ]
    legal = answer["domains"][1]
    assert legal["worst"] == {"version": 5, "step": "med", "perplexity": 13.0, "change": pytest.approx(0.3)}
    assert legal["steps"][-1]["step"] == "without code"
    assert answer["domains"][3]["worst"] is None
    assert "v5 (med), +30.0%" in shown(answer)
    assert "3 of 4 datasets got worse" in shown(answer)


def test_one_domain_alone():
    assert {one["domain"] for one in worse(three_domains(), "code")["domains"]} == {"code"}
    with pytest.raises(HistoryError, match="no version of tiny holds the domain 'cod'"):
        worse(three_domains(), "cod")


def test_figures_on_other_tokens_are_not_compared():
    history = a_history(
        [
            {"add": "a", "perplexity": {"a": 5.0}},
            {"add": "b", "perplexity": {"a": 6.0, "b": 5.0}},
            {"add": "c", "perplexity": {"a": 90.0, "b": 5.0, "c": 5.0}, "tokens": {"a": "others"}},
        ]
    )
    (a,) = worse(history, "a")["domains"]
    assert (a["version"], a["change"], a["not_comparable"]) == (3, pytest.approx(0.2), [4])
    assert "version 4 was measured on other tokens" in shown(worse(history, "a"))


# --- whose


def files(history: History, wanted: str, exported: bool) -> dict[str, str]:
    found = find_version(history, wanted).record.files
    if not exported:
        return dict(found)
    return {n.removeprefix("model/"): digest for n, digest in found.items() if n.startswith("model/")}


def ask(history: History, digests: dict[str, str], big: str = "safetensors") -> dict:
    return whose(history, FolderFiles(digests, {name: 1000 if name.endswith(big) else 10 for name in digests}))


@pytest.mark.parametrize("exported", [True, False])
def test_the_files_of_a_version_are_known(exported):
    history = three_domains()
    answer = ask(history, files(history, "4", exported) | {"README.md": "0" * 64})
    assert (answer["versions"], answer["differences"]) == ([4], [])
    assert answer["form"] == ("exported" if exported else "version")
    assert "byte by byte" in shown(answer)


@pytest.mark.parametrize("exported", [True, False])
def test_what_differs_from_the_closest_version_is_named(exported):
    history = three_domains()
    prefix = "" if exported else "model/"
    digests = files(history, "4", exported) | {f"{prefix}config.json": "0" * 64, f"{prefix}more": "1" * 64}
    answer = ask(history, digests)
    assert (answer["versions"], answer["closest"]) == ([], 4)
    assert answer["differences"] == [f"changed: {prefix}config.json", f"extra: {prefix}more"]
    del digests[f"{prefix}config.json"]
    assert ask(history, digests)["differences"] == [f"missing: {prefix}config.json", f"extra: {prefix}more"]
    assert "closest is" in shown(answer)


def test_a_folder_of_something_else_and_an_empty_one():
    answer = ask(three_domains(), {"a.txt": "0" * 64})
    assert (answer["versions"], answer["closest"]) == ([], None)
    assert "no version's files" in shown(answer)
    with pytest.raises(HistoryError, match="no files"):
        ask(three_domains(), {})


def test_a_running_sum_may_be_missing_only_where_it_was_dropped():
    history = three_domains()
    digests = files(history, "4", exported=False)
    del digests["state/sum/0"]
    assert ask(history, digests)["differences"] == ["missing: state/sum/0"]
    dropped = altered(history, 4, tags={"copal.sum_dropped": "true"})
    assert ask(dropped, digests)["versions"] == [4]


# --- the commands


def test_the_commands_on_a_real_registry(bench, capsys, tmp_path):
    def asked(*arguments: str) -> dict:
        assert main(["audit", *arguments, "--workspace", str(bench.root), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    append_log(bench.project, "promotion", version=1, to_version=1, details=MOVED)
    assert asked("used", "code")["versions"] == []
    assert asked("data", "--alias", "latest")["version"] == 1
    assert asked("data")["version"] is None  # the alias itself was not set
    assert asked("data", "--on", "9999-01-01")["version"] == 1
    assert asked("data", "--on", "2020-01-01")["version"] is None
    assert asked("diff", "1", "latest")["files"]["changed"] == 0
    assert asked("worse")["domains"] == []
    exported = tmp_path / "exported"
    assert main(["export", "1", str(exported), "--workspace", str(bench.root)]) == 0
    capsys.readouterr()
    (exported / "README.md").write_text("a card")
    assert asked("whose", str(exported))["versions"] == [1]
    assert asked("whose", str(bench.registry.folder(bench.registry.version(1))))["versions"] == [1]
    shards = tmp_path / "shards"
    assert main(["export", "1", str(shards), "--shard-size", "20KB", "--workspace", str(bench.root)]) == 0
    capsys.readouterr()
    assert len(list(shards.glob("model-*.safetensors"))) > 1
    assert asked("whose", str(shards))["versions"] == [1]
    config = exported / "config.json"
    config.write_text(config.read_text() + " ")
    answer = asked("whose", str(exported))
    assert (answer["closest"], answer["differences"]) == (1, ["changed: config.json"])
    assert main(["audit", "whose", str(exported), "--workspace", str(bench.root)]) == 0
    assert "closest is the model of version 1, 1 differ" in capsys.readouterr().out
    assert set(file_digests(exported, exported)) >= {"config.json", "README.md"}
    shutil.rmtree(exported)
    assert main(["audit", "whose", str(exported), "--workspace", str(bench.root)]) == 2
    assert "is no folder" in capsys.readouterr().err
    assert main(["audit", "diff", "1", "2", "--workspace", str(bench.root)]) == 2
    assert main(["audit", "data", "--on", "someday", "--workspace", str(bench.root)]) == 2
    assert main(["audit", "worse", "code", "--workspace", str(bench.root)]) == 2
