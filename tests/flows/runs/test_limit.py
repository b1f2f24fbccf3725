"""How long a step may take: what comes out when it takes longer, wherever the interruption arrives."""

from __future__ import annotations

import pytest

from copal.errors import CopalError
from flows.adapt import adapt
from flows.runs.limit import TimeLimitError, time_limit
from support.toys import holder
from support.waiting import work


def test_what_is_in_time_passes_and_so_do_its_errors():
    for seconds in (None, 600.0):
        with time_limit(seconds):
            pass
        error = CopalError("the data is wrong")
        with pytest.raises(CopalError) as caught, time_limit(seconds):
            raise error
        assert caught.value is error


def test_an_interruption_that_the_clean_up_of_a_library_hides_is_the_time_limit_all_the_same():
    def library() -> None:
        try:
            work(60.0)
        finally:
            raise ValueError("Task run is not set")

    with pytest.raises(TimeLimitError, match=r"run.time_limit, 0.1 s.*raise the limit") as caught, time_limit(0.1):
        library()
    assert isinstance(caught.value.__cause__, ValueError)


def test_an_interruption_while_prefect_makes_the_run_of_a_task_is_the_time_limit(bench, monkeypatch, prefect):
    bench.commit("code", 0)
    bench.set("model: {name: tiny", "run: {time_limit: 3}\nmodel: {name: tiny")
    with monkeypatch.context() as patch:
        patch.setattr("prefect.task_engine._create_task_run_locally", lambda **_: work(60.0))
        with pytest.raises(TimeLimitError, match=r"run.time_limit, 3 s"):
            adapt(str(bench.root), "code")
    assert holder(bench.project)["held"] == 0
