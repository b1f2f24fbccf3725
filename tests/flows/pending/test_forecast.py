"""`copal plan`: what would run, in which order, how long and how large, and which settings differ from the head's."""

from __future__ import annotations

import json

import pytest

from copal.errors import DataError, SettingsError
from flows.pending.changes import changes
from flows.pending.forecast import forecast
from flows.pending.plan import plan
from flows.step.run import plain_tasks, run_step
from flows.terminal.forecast import render_forecast
from flows.terminal.progress import console
from support.tasks import TASK, write_task


def drawn(found, capsys) -> str:
    console().print(render_forecast(found))
    return capsys.readouterr().out


def test_what_is_pending_in_its_order_and_what_it_takes(bench, capsys):
    bench.commit("legal", 1)
    bench.commit("code", 0)
    before = bench.snapshot()
    found = forecast(bench.project)
    assert bench.snapshot() == before
    assert json.loads(json.dumps(found)) == found
    assert (found["model"], found["head"], found["gates"], found["settings"]) == ("tiny", 1, False, [])
    first, second = found["steps"]
    assert (first["version"], first["domain"], first["domains"], first["replaces"]) == (2, "legal", 1, False)
    assert (second["version"], second["domain"], second["domains"], second["replaces"]) == (3, "code", 2, False)
    assert first["disk"]["model"] == (bench.base / "model.safetensors").stat().st_size
    assert second["needed"]["disk"] == first["needed"]["disk"] + first["disk"]["version"]
    assert second["seconds"]["evaluation"] > first["seconds"]["evaluation"]
    assert second["needed"]["memory"] >= first["needed"]["memory"] > 0
    assert first["refused"] is second["refused"] is None
    text = drawn(found, capsys)
    assert text.index("legal") < text.index("code") < text.index("all")
    assert "times rest on a short product" in text


def test_how_many_tasks_the_next_version_would_be_asked(bench, capsys, monkeypatch):
    bench.commit("code", 0)
    assert "asked" not in drawn(forecast(bench.project), capsys)
    bench.write("legal", 1)
    place = write_task(bench.workspace.data / "legal", seed=1)
    (place / "other.yml").write_text(TASK.replace("task: dialect", "task: other"))
    (place / ".hidden.yaml").write_text(TASK)
    bench.track("legal")
    found = forecast(bench.project)
    assert [(step["domain"], step["tasks"]) for step in found["steps"]] == [("code", 0), ("legal", 2)]
    assert "asked" not in drawn(found, capsys), "the next one is not"
    bench.commit("code", 2)
    found = forecast(bench.project)
    assert [(step["domain"], step["tasks"]) for step in found["steps"]] == [("legal", 2), ("code", 2)]
    assert "version 2 would be asked 2 tasks of its domains" in drawn(found, capsys)
    monkeypatch.setattr("flows.pending.forecast.harness_version", lambda: None)
    assert "pip install 'copal[tasks]'" in forecast(bench.project)["steps"][0]["refused"]
    bench.lose_data()
    found = forecast(bench.project)
    assert [(step["tasks"], step["refused"]) for step in found["steps"]] == [(None, None), (None, None)]
    assert "asked" not in drawn(found, capsys)


def test_nothing_to_do_and_nothing_to_build_on(bench, capsys):
    assert drawn(forecast(bench.project), capsys) == "nothing would run: version 1 knows what is there\n"
    bench.set("name: tiny", "name: other")
    assert "other has no versions yet: register a base" in drawn(forecast(bench.project), capsys)


@pytest.fixture(scope="module")
def adapted(make_bench, tmp_path_factory):
    """A lineage whose version 2 knows code; tests change settings and put them back."""
    bench = make_bench(tmp_path_factory.mktemp("adapted") / "workspace")
    bench.commit("code", 0)
    assert run_step(bench.project, "code", None, plain_tasks()).number == 2
    return bench


@pytest.fixture
def params(adapted):
    """The text of params.yaml, put back afterwards."""
    before = adapted.workspace.params.read_text()
    yield before
    adapted.workspace.params.write_text(before)


def test_times_rest_on_the_newest_version_where_this_machine_made_it(adapted):
    adapted.commit("code", 2)
    found = forecast(adapted.project)
    (step,) = found["steps"]
    assert (step["replaces"], step["domains"]) == (True, 1)
    took = adapted.registry.record(adapted.registry.version(2)).seconds.total
    assert "the newest version took on this machine" in found["timed_by"]
    parts = ("statistics", "way back", "solve", "evaluation")
    assert sum(step["seconds"].get(part, 0) for part in parts) == pytest.approx(took, rel=1e-6)


@pytest.mark.parametrize(
    ("section", "name", "then", "now", "takes"),
    [
        ("prune", "prune.sparsity", 0.5, 0.6, "put it back, or begin another lineage"),
        ("prune", "prune.criterion", "loss", '"output"', "put it back, or begin another lineage"),
        ("calibration", "calibration.windows", 8, 4, "put it back, or begin another lineage"),
        ("prune", "prune.damping", 0.1, 0.2, "copal adapt DOMAIN"),
        ("calibration", "calibration.evaluation_windows", 8, 9, "counts at the next step"),
        ("gates", "gates.forgetting", 0.15, 0.3, "counts for gates that run from now on"),
        ("domains", "domains.code.weight", 1.0, 2.0, "copal adapt code"),
        ("domains", "domains.legal.weight", 1.0, 2.0, "counts when its data comes"),
    ],
)
def test_a_setting_that_differs_and_what_it_takes(adapted, params, capsys, section, name, then, now, takes):
    """A changed prune.sparsity was silently ignored."""
    settings = {
        "model": {"name": "tiny", "dtype": "float32"},
        "calibration": {"window_length": 32, "windows": 8, "evaluation_windows": 8, "evaluation_share": 0.4},
        "prune": {"iterations": 30},
    }
    inner = settings.setdefault(section, {})
    *_, last = name.split(".")
    (inner if section != "domains" else inner.setdefault(name.split(".")[1], {}))[last] = json.loads(str(now))
    adapted.workspace.params.write_text(json.dumps(settings))
    (change,) = changes(adapted.registry.record(adapted.registry.version(2)), adapted.settings, 2)
    assert (change.name, change.then, change.now) == (name, then, json.loads(str(now)))
    assert takes in change.takes
    found = forecast(adapted.project)
    assert [one["name"] for one in found["settings"]] == [name]
    assert takes.split()[-1] in " ".join(drawn(found, capsys).split())
    said = [note for note in plan(adapted.project).notes if name in note]
    assert bool(said) != change.counts, "status and watch say it where it does not count by itself"
    assert change.refused == any(step["refused"] for step in found["steps"])


def test_a_step_that_would_be_refused_is_said_to_be(adapted, params, capsys):
    adapted.set("prune: {iterations: 30}", "prune: {iterations: 30, sparsity: 0.6}")
    found = forecast(adapted.project)
    assert found["steps"][0]["refused"].startswith("prune.sparsity is 0.6, not 0.5: every version of a lineage has")
    assert "version 3 would be refused: prune.sparsity is 0.6" in drawn(found, capsys)


def test_data_that_was_refused_is_no_data_that_the_newest_version_knows(bench, capsys):
    bench.commit("code", 0, documents=1)
    assert "nothing would run" not in drawn(forecast(bench.project), capsys)
    with pytest.raises(DataError):
        run_step(bench.project, "code", None, plain_tasks())
    found = forecast(bench.project)
    assert [entry["domain"] for entry in found["refused"]] == ["code"]
    lines = drawn(found, capsys).splitlines()
    assert lines[0] == "nothing would run"
    assert lines[1].startswith("refused: code at ")
    bench.commit("code", 1)
    assert forecast(bench.project)["refused"] == []


def test_settings_of_another_copal_are_no_reason_not_to_look(adapted):
    record = adapted.registry.record(adapted.registry.version(2))
    other = record.model_copy(update={"settings": {**record.settings, "prune": {"unheard_of": 1}}})
    with pytest.raises(SettingsError, match=r"the record of version 2: prune\.unheard_of is not a setting"):
        changes(other, adapted.settings, 2)
