"""Text that two domains share never calibrates one and evaluates the other, and what was left out stays left out."""

from __future__ import annotations

import json

import pytest

from flows.cli.entry import main
from flows.data.dataset import UnusableDataError
from flows.pending.plan import plan
from flows.verification.replay import replay
from support.toys import step


def share(bench, domain: str, own: int, first: int, more: int = 120) -> None:
    """A domain of `more` documents of its own dialect, and of the first ones of `code`'s, under other ids."""
    bench.write("code", 0, first)
    lines = (bench.root / "data/code/documents.jsonl").read_text().splitlines() if first else []
    bench.write("code", 0, 120)
    bench.write(domain, own, more)
    taken = [json.dumps(json.loads(line) | {"id": f"{domain}-{n}"}) for n, line in enumerate(lines, start=1000)]
    with (bench.root / "data" / domain / "documents.jsonl").open("a") as file:
        file.writelines(f"{line}\n" for line in taken)
    bench.track(domain)


@pytest.fixture
def sharing(bench):
    """code, and legal with 20 documents of code's."""
    bench.set("windows: 8, evaluation_windows: 8", "windows: 60, evaluation_windows: 60")
    bench.commit("code", 0, 120)
    step(bench, "code")
    share(bench, "legal", 1, 20)
    return bench


def test_what_was_left_out_is_counted_recorded_and_left_out_by_every_later_step_and_replay(sharing, capsys):
    bench = sharing
    step(bench, "legal")
    registry = bench.registry
    first = registry.record(registry.version(3)).step
    assert 0 < len(first.left_out) <= 20

    bench.commit("prose", 2)
    step(bench, "prose")
    later = next(
        domain for domain in bench.registry.record(bench.registry.version(4)).domains if domain.name == "legal"
    )
    assert later.left_out == first.left_out
    assert later.evaluation_digest == first.evaluation_digest
    for last_step in (True, False):
        assert replay(bench.project, bench.registry.version(3), last_step=last_step).identical


def test_too_much_in_common_is_refused_and_nothing_is_registered(bench):
    bench.set("windows: 8, evaluation_windows: 8", "windows: 60, evaluation_windows: 60")
    bench.commit("code", 0, 120)
    step(bench, "code")
    share(bench, "legal", 1, 120, more=24)
    with pytest.raises(UnusableDataError, match=r"data/legal: \d+ of \d+ documents for .*overlap_limit"):
        step(bench, "legal")
    assert len(bench.registry.versions()) == 2


def test_the_same_data_under_two_names_is_said(bench):
    bench.commit("code", 0)
    (bench.root / "data" / "twin").mkdir()
    text = (bench.root / "data/code/documents.jsonl").read_text()
    (bench.root / "data/twin/documents.jsonl").write_text(text)
    bench.track("twin")
    assert any("data/code and data/twin hold the same data" in note for note in plan(bench.project).notes)


def test_the_command_line_says_how_many_documents_were_left_out(sharing, capsys):
    assert main(["adapt", "legal", "--workspace", str(sharing.root)]) == 0
    assert "of its documents were left out, since other domains have their text" in capsys.readouterr().out
