"""What a caller of `run_adapt` hears of a run on a worker; the runs themselves are in test_up.py."""

from __future__ import annotations

import pytest
from prefect.states import Cancelled, Completed, Crashed, Failed, State

from copal.errors import CopalError
from flows.data.dataset import MissingDataError
from flows.launch import AdaptFailedError, _raise_failure


@pytest.mark.parametrize(
    ("state", "kind", "said"),
    [
        (
            Failed(message="Flow run encountered an exception: DataError: data/code: 3 documents,\nwants 8"),
            AdaptFailedError,
            "data/code: 3 documents, wants 8",
        ),
        (
            Failed(message="Flow run encountered an exception: ResourceError: out of memory: lower model.batch"),
            AdaptFailedError,
            "code: out of memory: lower model.batch",
        ),
        (
            Failed(message="Flow run encountered an exception: MissingDataError: data/code: push it"),
            MissingDataError,
            "data/code: push it",
        ),
        (Failed(message=None), AdaptFailedError, "code: the step's run is Failed: no reason given"),
        (
            Crashed(message="Process exited with status code: -9. Killed"),
            AdaptFailedError,
            "code: the step's run is Crashed: Process exited with status code: -9. Killed",
        ),
        (Cancelled(), AdaptFailedError, "code: the step was cancelled"),
    ],
)
def test_a_run_that_did_not_complete_is_an_error_of_one_line(state: State, kind: type[CopalError], said: str) -> None:
    with pytest.raises(CopalError) as caught:
        _raise_failure("code", state)
    assert type(caught.value) is kind
    assert str(caught.value) == said


def test_a_run_that_completed_is_none() -> None:
    _raise_failure("code", Completed())
