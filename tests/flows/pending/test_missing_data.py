from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from flows.pending.missing_data import Waiting, forget, note_missing, waiting
from flows.workspace import Workspace

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
A, B = "a" * 32 + ".dir", "b" * 32 + ".dir"


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)


def miss(workspace: Workspace, domain: str = "code", md5: str = A, now: datetime = NOON, interval: float = 60) -> None:
    note_missing(workspace, "tiny", domain, md5, interval, now)


def test_the_pause_doubles_with_every_try_up_to_an_hour(workspace: Workspace) -> None:
    pauses, now = [], NOON
    for _ in range(8):
        miss(workspace, now=now)
        entry = waiting(workspace, "tiny")["code"]
        pauses.append((entry.next_try - now).total_seconds())
        now = entry.next_try
    assert pauses == [60, 120, 240, 480, 960, 1920, 3600, 3600]
    assert (entry.tries, entry.since) == (8, NOON)


def test_years_of_waiting_still_have_a_next_try(workspace: Workspace) -> None:
    miss(workspace)
    path = workspace.private / "waiting.json"
    path.write_text(path.read_text().replace('"tries": 1', '"tries": 100000'))
    miss(workspace)
    assert waiting(workspace, "tiny")["code"].next_try == NOON + timedelta(hours=1)


def test_other_data_begins_anew(workspace: Workspace) -> None:
    miss(workspace)
    miss(workspace)
    later = NOON + timedelta(days=1)
    miss(workspace, md5=B, now=later)
    expected = Waiting(dvc_md5=B, tries=1, since=later, next_try=later + timedelta(minutes=1))
    assert waiting(workspace, "tiny") == {"code": expected}


def test_models_and_domains_do_not_mix(workspace: Workspace) -> None:
    miss(workspace)
    miss(workspace, "legal")
    note_missing(workspace, "other", "code", B, 60, NOON)
    forget(workspace, "tiny", "code")
    forget(workspace, "tiny", "never waited")
    assert waiting(workspace, "tiny").keys() == {"legal"}
    assert waiting(workspace, "other")["code"].dvc_md5 == B
    assert waiting(workspace, "a third") == {}


@pytest.mark.parametrize(
    "text",
    [None, "", "{", "[]", '{"tiny": 3}', '{"tiny": {"code": {}}}', '{"tiny": {"code": {"dvc_md5": "a", "tries": 1,'
     '"since": "noon", "next_try": "later"}}}', "\udcff"],
)  # fmt: skip
def test_a_file_that_is_lost_or_damaged_means_that_nothing_waits(workspace: Workspace, text: str | None) -> None:
    workspace.private.mkdir()
    if text is not None:
        (workspace.private / "waiting.json").write_bytes(text.encode(errors="surrogateescape"))
    assert waiting(workspace, "tiny") == {}
    miss(workspace)
    assert waiting(workspace, "tiny").keys() == {"code"}


def test_it_is_due_at_its_time_and_when_the_clock_was_set_back(workspace: Workspace) -> None:
    miss(workspace)
    entry = waiting(workspace, "tiny")["code"]
    seconds = {-1: True, 0: False, 59: False, 60: True, 3600: True}
    assert {second: entry.is_due(NOON + timedelta(seconds=second)) for second in seconds} == seconds
