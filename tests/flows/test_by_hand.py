"""Steps without Prefect: tried again where time can help, ended by the time limit."""

from __future__ import annotations

import pytest

from copal.errors import CopalError
from flows import by_hand
from flows.runs.limit import TimeLimitError
from support.toys import holder
from support.waiting import work


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(by_hand, "PAUSES", (0.0, 0.0))


def failing(real, times, error):
    """`real`, which raises `error` the first times that it is called; and how often it was called."""
    calls = []

    def call(*arguments):
        calls.append(arguments)
        if len(calls) <= times:
            raise error
        return real(*arguments)

    return call, calls


@pytest.mark.parametrize(
    ("task", "name"),
    [("inputs_of", "inputs"), ("fetch_data", "fetch"), ("register_step", "register"), ("run_gates", "gates")],
)
def test_what_may_pass_is_tried_three_times_and_each_failure_is_told(bench, monkeypatch, capsys, task, name):
    from flows.step import run

    bench.commit("code", 0)
    call, calls = failing(getattr(run, task), 2, OSError("the network is down"))
    monkeypatch.setattr(run, task, call)
    assert by_hand.watch(str(bench.root)) == [2]
    assert len(calls) == 3
    assert bench.registry.head().concluded
    assert capsys.readouterr().err.count(f"{name} failed (OSError: the network is down) and is tried again in 0 s") == 2


def test_the_third_failure_is_the_last_and_is_told_as_it_is(bench, monkeypatch):
    bench.commit("code", 0)
    call, calls = failing(None, 3, OSError("the network is down"))
    monkeypatch.setattr("flows.step.run.register_step", call)
    with pytest.raises(OSError, match=r"^the network is down$"):
        by_hand.adapt(str(bench.root), "code")
    assert len(calls) == 3
    assert bench.registry.head().number == 1
    assert holder(bench.project)["held"] == 0


def test_gates_that_a_killed_step_left_are_tried_again_too(bench, monkeypatch, capsys):
    from flows.step import run

    bench.commit("code", 0)
    real = run.run_gates
    monkeypatch.setattr(run, "run_gates", failing(None, 1, KeyboardInterrupt())[0])
    with pytest.raises(KeyboardInterrupt):
        by_hand.adapt(str(bench.root), "code")
    assert not bench.registry.head().concluded
    call, calls = failing(real, 1, OSError("the network is down"))
    monkeypatch.setattr(run, "run_gates", call)
    assert by_hand.watch(str(bench.root)) == []
    assert len(calls) == 2
    assert bench.registry.head().concluded
    assert "gates failed (OSError: the network is down)" in capsys.readouterr().err


@pytest.mark.parametrize("error", [CopalError("mend it"), KeyboardInterrupt()])
def test_what_a_user_has_to_mend_or_has_ended_is_not_tried_again(bench, monkeypatch, error):
    bench.commit("code", 0)
    call, calls = failing(None, 1, error)
    monkeypatch.setattr("flows.step.run.fetch_data", call)
    with pytest.raises(type(error)):
        by_hand.adapt(str(bench.root), "code")
    assert len(calls) == 1


def test_a_step_past_its_time_limit_is_stopped_and_frees_the_lineage(bench, monkeypatch):
    bench.commit("code", 0)
    bench.set("model: {name: tiny", "run: {time_limit: 0.5}\nmodel: {name: tiny")
    with monkeypatch.context() as patch:
        patch.setattr("flows.step.run.evaluate_step", lambda *args: work(60.0))
        with pytest.raises(TimeLimitError, match=r"run.time_limit, 0.5 s"):
            by_hand.adapt(str(bench.root), "code")
    assert holder(bench.project)["held"] == 0
