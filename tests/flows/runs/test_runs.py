"""What Prefect does for a flow, on a real server: one run a step, its end and what a caller hears of it, checks that
come while one runs, and what pages of runs show. Workers and their processes are in test_up.py."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId
from prefect.client.schemas.objects import ConcurrencyLimitStrategy, ConcurrencyOptions, FlowRun, State
from prefect.settings import PREFECT_LOGGING_LEVEL, PREFECT_RESULTS_LOCAL_STORAGE_PATH, temporary_settings
from prefect.states import Cancelled, Completed, Crashed, Failed, Pending, Running

from copal.errors import CopalError, ResourceError
from flows.adapt import adapt
from flows.data.dataset import MissingDataError
from flows.gates.judge import GateResult
from flows.runs.again import check_again
from flows.runs.artifacts import artifact_key, gate_rows, progress_artifacts
from flows.runs.dispatch import AdaptFailedError, adapt_deployment, outcome, start_run, wait_for_end
from flows.runs.log import tell
from flows.runs.names import adapt_name
from flows.watch import watch
from flows.workspace import WorkspaceError


@pytest.fixture
def client(prefect) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as client:
        yield client


@pytest.fixture
def deploy(client: SyncPrefectClient) -> Iterator[Callable[..., UUID]]:
    """deploy(flow, strategy, **parameters) -> the id of a deployment with one slot, and no worker."""
    made: list[UUID] = []

    def make(which: Any, strategy: str = "ENQUEUE", **parameters: Any) -> UUID:
        options = ConcurrencyOptions(collision_strategy=ConcurrencyLimitStrategy(strategy))
        made.append(
            client.create_deployment(
                client.create_flow(which),
                f"deployment-{len(made)}",
                concurrency_limit=1,
                concurrency_options=options,
                parameters=parameters,
            )
        )
        return made[-1]

    yield make
    for deployment in made:
        client.delete_deployment(deployment)


def set_state(client: SyncPrefectClient, run: FlowRun, *states: State[Any]) -> State[Any]:
    """What a worker and the run's process tell the server; gives the state that the server has set last."""
    for state in states:
        answer = client.set_flow_run_state(run.id, state)
    return answer.state or state


def runs_of(client: SyncPrefectClient, deployment: UUID) -> list[FlowRun]:
    mine = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[deployment]))
    return list(client.read_flow_runs(flow_run_filter=mine))


# --- one run a step


def test_a_step_has_one_run_until_that_has_ended(client, deploy) -> None:
    deployment = deploy(adapt, workspace="/nowhere")

    def start(key: str = "a" * 64) -> FlowRun:
        return start_run(client, deployment, "adapt code", {"domain": "code"}, key)

    first = start()
    assert start().id == first.id
    assert start("b" * 64).id != first.id
    other = start_run(client, deploy(adapt, workspace="/other"), "adapt code", {}, "a" * 64)
    assert other.id != first.id, "another workspace took the same first step"
    set_state(client, first, Pending(), Running())
    assert start().id == first.id, "a watcher that was killed finds the run of its step again"
    seen = [first.id]
    for end in (Failed(), Crashed(), Completed(), Failed(), Failed()):
        client.set_flow_run_state(seen[-1], end, force=True)
        again = start()
        assert again.id not in seen, f"after {end.type} it can be started again"
        assert start().id == again.id
        seen.append(again.id)
    set_state(client, again, Cancelled())  # before it began
    assert start().id not in seen


def test_many_watchers_that_start_a_step_at_once_start_one_run(client, deploy) -> None:
    deployment = deploy(adapt)
    failed = start_run(client, deployment, "adapt code", {}, "e" * 64)
    client.set_flow_run_state(failed.id, Failed(), force=True)

    def start(_: int) -> UUID:
        with get_client(sync_client=True) as own:
            return start_run(own, deployment, "adapt code", {}, "e" * 64).id

    with ThreadPoolExecutor(4) as pool:
        started = set(pool.map(start, range(8)))
    assert len(started) == 1
    assert failed.id not in started


def test_a_run_whose_process_is_gone_is_not_waited_for(client, deploy) -> None:
    deployment = deploy(adapt)
    run = start_run(client, deployment, "adapt code", {}, "c" * 64)
    running = set_state(client, run, Pending(), Running())
    lease = running.state_details.deployment_concurrency_lease_id
    client.release_concurrency_slots_with_lease(lease)  # what the server does when nobody renews it
    state = wait_for_end(client, deployment, run.id, poll=0.01)
    assert state.is_crashed()
    with pytest.raises(
        AdaptFailedError, match=r"^code: the step's run is Crashed: Its process does not renew its slot"
    ):
        outcome("code", state, nobody)
    assert start_run(client, deployment, "adapt code", {}, "c" * 64).id != run.id


def test_a_run_that_lives_is_waited_for(client, deploy) -> None:
    deployment = deploy(adapt)
    run = start_run(client, deployment, "adapt code", {}, "d" * 64)
    set_state(client, run, Pending(), Running())
    ends = threading.Timer(1.0, client.set_flow_run_state, [run.id, Completed()])
    ends.start()
    assert wait_for_end(client, deployment, run.id, poll=0.01).is_completed()
    ends.join()


def test_the_deployment_of_another_workspace_is_not_taken(client, deploy, tmp_path) -> None:
    deploy(adapt, workspace=str(tmp_path / "other"))
    assert adapt_deployment(str(tmp_path / "here")) is None
    here = deploy(adapt, workspace=str(tmp_path / "here"))
    assert adapt_deployment(str(tmp_path / "x" / ".." / "here")).id == here


# --- what a caller hears


def nobody() -> int | None:
    """The registry is not asked where the run says it itself."""
    raise AssertionError


@flow(persist_result=True, result_serializer="json")
def ends(kind: str) -> int | None:
    """Ends as `adapt` may end."""
    if kind == "missing":
        raise MissingDataError("data/code at 0123.dir is nowhere: dvc push")
    if kind == "memory":
        raise ResourceError("out of memory: lower model.batch")
    if kind == "bug":
        raise ZeroDivisionError("division\nby zero")
    if kind == "encoding":
        b"\xff".decode()  # an exception that cannot be made from its message alone
    return 4 if kind == "version" else None


@pytest.fixture
def told(client: SyncPrefectClient, tmp_path: Path) -> Iterator[Callable[[str], State[Any]]]:
    """told(kind) -> the last state of a run as another process reads it."""
    with temporary_settings({PREFECT_RESULTS_LOCAL_STORAGE_PATH: tmp_path / "results"}):
        yield lambda kind: client.read_flow_run(ends(kind, return_state=True).state_details.flow_run_id).state


def test_numbers_and_errors_of_copal_come_as_they_were(told, tmp_path) -> None:
    assert outcome("code", told("version"), nobody) == 4
    assert outcome("code", told("known"), nobody) is None
    for kind, error, said in (
        ("missing", MissingDataError, "data/code at 0123.dir is nowhere: dvc push"),
        ("memory", ResourceError, "out of memory: lower model.batch"),
    ):
        with pytest.raises(CopalError) as caught:
            outcome("code", told(kind), nobody)
        assert type(caught.value) is error
        assert str(caught.value) == said
    stored = [path.read_text() for path in (tmp_path / "results").iterdir()]
    assert {"4", "null"} < set(stored), "plain JSON, no pickle"
    assert {json.loads(text)["message"] for text in stored if text not in ("4", "null")} == {
        "data/code at 0123.dir is nowhere: dvc push",
        "out of memory: lower model.batch",
    }


@pytest.mark.parametrize(
    ("kind", "said"),
    [("bug", "ZeroDivisionError: division by zero"), ("encoding", "UnicodeDecodeError: 'utf-8' codec can't decode")],
)
def test_another_error_is_one_line_that_names_the_domain(told, kind: str, said: str) -> None:
    with pytest.raises(AdaptFailedError) as caught:
        outcome("code", told(kind), nobody)
    assert str(caught.value).startswith(f"code: the step's run is Failed: Flow run encountered an exception: {said}")
    assert "\n" not in str(caught.value)


def test_without_a_storage_that_both_reach_the_registry_knows_the_version(told, tmp_path) -> None:
    state, missing, memory = told("version"), told("missing"), told("memory")
    (tmp_path / "results").rename(tmp_path / "away")
    assert outcome("code", state, lambda: 7) == 7
    with pytest.raises(MissingDataError, match=r"^data/code at 0123\.dir is nowhere: dvc push$"):
        outcome("code", missing, nobody)
    with pytest.raises(AdaptFailedError, match=r"ResourceError: out of memory: lower model\.batch"):
        outcome("code", memory, nobody)


def test_a_cancelled_and_a_crashed_run_have_no_result() -> None:
    with pytest.raises(AdaptFailedError, match=r"^code: the step was cancelled$"):
        outcome("code", Cancelled(), nobody)
    with pytest.raises(
        AdaptFailedError, match=r"^code: the step's run is Crashed: Process exited with status code: -9$"
    ):
        outcome("code", Crashed(message="Process exited with status code: -9"), nobody)


def test_the_flow_adapt_leaves_its_error_for_who_started_it(client, tmp_path) -> None:
    with temporary_settings({PREFECT_RESULTS_LOCAL_STORAGE_PATH: tmp_path / "results"}):
        run = adapt(str(tmp_path / "none"), "code", return_state=True).state_details.flow_run_id
        with pytest.raises(WorkspaceError, match="none is not a folder"):
            outcome("code", client.read_flow_run(run).state, nobody)


# --- checks that come while one runs


def test_checks_do_not_pile_up_and_what_an_event_brought_meanwhile_is_looked_at_once_more(client, deploy) -> None:
    deployment = deploy(watch, "CANCEL_NEW", workspace="/w")
    busy = client.create_flow_run_from_deployment(deployment)
    set_state(client, busy, Pending(), Running())
    events = [client.create_flow_run_from_deployment(deployment) for _ in range(3)]
    assert [set_state(client, event, Pending()).type for event in events] == ["CANCELLED"] * 3
    set_state(client, busy, Completed())

    check_again(watch, busy, Completed())
    check_again(watch, busy, Completed())
    waiting = [run for run in runs_of(client, deployment) if run.state.is_scheduled()]
    assert len(waiting) == 1, "one more check, however many events came"
    (more,) = waiting
    assert more.parameters == {"workspace": "/w"}
    assert set_state(client, more, Pending(), Running()).is_running(), "the slot is free"

    set_state(client, more, Failed())
    check_again(watch, more, Failed())
    assert not [run for run in runs_of(client, deployment) if run.state.is_scheduled()], "nothing came meanwhile"


def test_a_check_by_hand_starts_nothing(client) -> None:
    @flow
    def alone() -> None:
        pass

    before = len(client.read_flow_runs())
    run = client.read_flow_run(alone(return_state=True).state_details.flow_run_id)
    check_again(watch, run, Completed())
    assert len(client.read_flow_runs()) == before + 1


# --- what pages show


@given(st.lists(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True), unique=True, min_size=2, max_size=9))
def test_two_lineages_have_two_keys_that_prefect_takes(names) -> None:
    from prefect.client.schemas.actions import ArtifactCreate

    keys = [ArtifactCreate(key=artifact_key(name, "gates")).key for name in names]
    assert len(set(keys)) == len(names)


def test_a_plain_name_is_its_key_and_names_that_would_meet_do_not() -> None:
    assert artifact_key("my-llm", "gates") == "my-llm-gates"
    like = ["my-llm", "My-llm", "my.llm", "my_llm", "MY-LLM"]
    keys = {artifact_key(name, "gates") for name in like}
    assert len(keys) == len(like)
    as_changed = artifact_key("My-llm", "gates").removesuffix("-gates")  # somebody gives another lineage this name
    assert artifact_key(as_changed, "gates") not in keys


def test_a_long_stage_is_shown_with_few_updates(client, prefect) -> None:
    seconds = iter([0.0, 1.0, 4.9, 5.0, 5.1, 9.9, 10.1, 10.2, 10.3, 10.4])
    shares: list[float | None] = []

    def shown(key: str) -> float | None:
        from prefect.artifacts import Artifact

        found = Artifact.get(key)
        return None if found is None else found.data

    @flow
    def long() -> None:
        report = progress_artifacts("long-stage", lambda: next(seconds))
        for done in range(8):
            report("prune", done, 8)
            shares.append(shown("long-stage-prune"))
        report("prune", 8, 8)
        shares.append(shown("long-stage-prune"))
        report("register", 1, 1)  # a short one
        assert shown("long-stage-register") is None

    long()
    assert shares == [None, None, None, 37.5, 37.5, 37.5, 75.0, 75.0, 100.0]


def test_a_server_that_is_away_costs_a_step_nothing(monkeypatch) -> None:
    def away(*_: object) -> None:
        raise httpx.ConnectError("connection refused")

    monkeypatch.setattr("flows.runs.artifacts.create_progress_artifact", away)
    seconds = iter([0.0, 6.0, 12.0])
    report = progress_artifacts("tiny", lambda: next(seconds))
    for done in range(3):
        report("prune", done, 3)


def test_the_table_of_the_gates_names_what_failed() -> None:
    good = GateResult(name="sparsity", passed=True, value=0.5, limit=0.5, detail="as wanted")
    bad = GateResult(name="dense", passed=False, value=12.0, limit=2.0, detail="medical: 99, 8.25 in the dense base")
    assert gate_rows([good, bad]) == [
        {"gate": "sparsity", "": "passed", "value": "0.5", "limit": "0.5", "detail": "as wanted"},
        {"gate": "dense", "": "FAILED", "value": "12", "limit": "2", "detail": "medical: 99, 8.25 in the dense base"},
    ]


def test_runs_have_names_that_tell(bench, client) -> None:
    sha = bench.commit("bad", 0, documents=3)
    here = str(bench.root)

    def name(state: State[Any]) -> str:
        return client.read_flow_run(state.state_details.flow_run_id).name

    from flows.promote import promote, rollback
    from flows.verify import verify
    from flows.withdraw import withdraw

    assert name(watch(here, return_state=True)) == "watch tiny"
    assert name(adapt(here, "bad", sha, return_state=True)) == f"adapt bad {sha[:8]}"
    assert name(withdraw(here, "bad", "why", return_state=True)) == "withdraw bad from tiny"
    assert name(promote(here, "7", return_state=True)) == "promote tiny version 7"
    assert name(promote(here, "challenger", return_state=True)) == "promote tiny challenger"
    assert name(rollback(here, return_state=True)) == "rollback tiny"
    assert name(verify(here, data=False, return_state=True)) == "verify tiny"
    assert name(watch("/nowhere", return_state=True)) == "watch"
    assert adapt_name("code", "main") == "adapt code main"


def test_a_line_goes_to_the_log_of_the_run_or_to_the_terminal(prefect, capsys, caplog) -> None:
    @flow
    def says() -> None:
        tell("waits for somebody")

    says()  # of these tests, as of the command line, no log is kept
    tell("without Prefect")
    assert capsys.readouterr().out == "waits for somebody\nwithout Prefect\n"
    with temporary_settings({PREFECT_LOGGING_LEVEL: "INFO"}), caplog.at_level(logging.INFO, "prefect.flow_runs"):
        says()
    assert "waits for somebody" in caplog.messages
    assert "waits for somebody" not in capsys.readouterr().out
