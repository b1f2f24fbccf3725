from __future__ import annotations

import io

import pytest
from rich.console import Console

from flows.lineage.history import HistoryError
from flows.lineage.scores import scores, standing
from flows.pending.status import status
from flows.project import open_project
from flows.start.init import init_workspace
from flows.terminal.status import render_scores, render_status
from support.histories import a_record, three_domains


def version(number: int, domain: str | None, perplexity: dict[str, float], dense: dict[str, float], **more) -> dict:
    made = {
        "version": number,
        "parent": number - 1 or None,
        "domain": domain,
        "dvc_md5": f"{number:032x}.dir" if domain else None,
        "git_rev": f"{number:040x}" if domain else None,
        "withdrawn": None,
        "sparsity": 0.5 if domain else 0.0,
        "weights_back": None,
        "perplexity": perplexity,
        "dense_perplexity": dense,
        "seconds": {"statistics": 1.0, "solve": 2.0, "evaluate": 3.0} if domain else {},
        "gates": None,
        "failed": {},
        "aliases": [],
    }
    return made | standing(a_record(perplexity=perplexity, dense_perplexity=dense)) | more


def found(*versions: dict, **more) -> dict:
    return {
        "model": "tiny",
        "versions": list(versions),
        "pending": [],
        "waiting": [],
        "refused": [],
        "notes": [],
        "problems": [],
    } | more


def drawn(renderable: object, width: int) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=width).print(renderable)
    return [line.rstrip() for line in stream.getvalue().splitlines()]


def shown(what: dict, width: int = 120) -> list[str]:
    return drawn(render_status(what), width)


def many(versions: int, domains: int) -> dict:
    """A lineage as large as a team's, with names as long as theirs."""
    names = [f"tickets-2026-{number:02}" for number in range(domains)]
    made = [version(1, None, {}, {})]
    for number in range(2, versions + 1):
        known = names[: number - 1]
        scores = {name: 10.0 + place for place, name in enumerate(known)}
        made.append(version(number, names[(number - 2) % domains], scores, dict.fromkeys(known, 10.0), gates="passed"))
    made[-1]["aliases"] = ["challenger", "champion", "latest"]
    return found(*made)


def test_the_newest_version_stands_first_with_what_matters_of_each():
    lines = shown(
        found(
            version(1, None, {}, {}),
            version(2, "legal", {"legal": 20.0}, {"legal": 10.0}),
            version(
                3,
                "code",
                {"legal": 21.0, "code": 8.4},
                {"legal": 10.0, "code": 7.0},
                gates="passed",
                aliases=["challenger", "latest"],
            ),
        )
    )
    assert [line.split() for line in lines if line.strip()[:1].isdigit()] == [
        ["3", "code", "13.28", "1.59", "2.10", "legal", "passed", "challenger"],
        ["2", "legal", "20.00", "2.00", "2.00", "legal"],
        ["1", "dense", "base"],
    ]
    assert lines[0] == "tiny: 3 versions, the newest first"


def test_fifty_versions_and_thirty_domains_fit_into_eighty_columns():
    lines = shown(many(50, 30), 80)
    rows = [line.split() for line in lines if line.strip()[:1].isdigit()]
    assert [row[0] for row in rows[:-1]] == [str(number) for number in range(50, 30, -1)]
    assert "30 older: `copal lineage` shows all of them" in " ".join(lines)
    assert rows[0] == ["50", "tickets-2026-18", "22.82", "2.28", "3.90", "tickets-2026-29", "passed", "challenger"]
    assert len(rows) == 21  # one line each
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)  # nothing is cut away


def test_what_the_newest_version_failed_stands_below():
    why = {"dense": "code: 30, 6.76 in the dense base"}
    one, two = (version(n, "code", {}, {}, gates="failed", failed=why) for n in (2, 3))
    assert shown(found(one, two))[-1] == "version 3 failed dense: code: 30, 6.76 in the dense base"
    assert not any("version 2 failed" in line for line in shown(found(one, two)))


def test_the_domains_of_a_version_each_in_a_row_the_worst_first():
    told = scores(three_domains(), "champion")
    lines = drawn(render_scores(told), 80)
    assert lines[0] == "version 5 of tiny: med, sparsity 0.4998, 6.0 s, 500 weights came back"
    assert [line.split() for line in lines if line.split()[:1] in (["legal"], ["med"], ["code"], ["geometric"])] == [
        ["legal", "v4", "13.00", "6.00", "2.17", "10.00", "+30%"],
        ["code", "v3", "8.20", "6.00", "1.37", "8.00", "+2.5%"],
        ["med", "v5", "7.00", "6.00", "1.17", "7.00"],
        ["geometric", "mean", "9.07", "6.00", "1.51"],
    ]
    with pytest.raises(HistoryError, match="no version or alias '9'"):
        scores(three_domains(), "9")


def test_what_is_pending_stands_below():
    lines = shown(
        found(
            version(1, None, {}, {}),
            pending=[{"domain": "code", "dvc_md5": "0123456789abcdef.dir", "git_rev": "f" * 40}],
            waiting=[
                {
                    "domain": "law",
                    "dvc_md5": "abcdef0123456789.dir",
                    "git_rev": "e" * 40,
                    "tries": 2,
                    "since": "2026-01-01T00:00:00+00:00",
                    "next_try": "2026-01-01T00:02:00+00:00",
                }
            ],
            refused=[
                {
                    "domain": "bad",
                    "dvc_md5": "00112233445566.dir",
                    "git_rev": "d" * 40,
                    "reason": "data/bad/a.jsonl, line 1: no field text",
                    "since": "2026-01-01T00:00:00+00:00",
                }
            ],
            notes=["data/legal is no longer tracked here"],
            problems=["data/[Bad]: '[Bad]' cannot name a domain"],
        )
    )
    assert " ".join(lines[-9:]).split("pending: ")[1].split(" refused: ")[0] == (
        "code at 0123456789 next: `copal watch --once` takes what is pending, `copal plan` says how long that takes "
        "waiting for data: law at abcdef0123, looked for 2 times since 2026-01-01T00:00:00+00:00, "
        "again at 2026-01-01T00:02:00+00:00; run `dvc push` where the data is"
    )
    assert " ".join(lines[-4:-2]) == (
        "refused: bad at 0011223344 since 2026-01-01T00:00:00+00:00: data/bad/a.jsonl, line 1: no field text; mend the "
        "data and commit it again, or try once more as it is: `copal adapt bad`"
    )
    assert lines[-2:] == [
        "note: data/legal is no longer tracked here",
        "problem: data/[Bad]: '[Bad]' cannot name a domain",
    ]


def test_a_workspace_without_versions(tmp_path):
    workspace = init_workspace(tmp_path / "new", "tiny")
    what = status(open_project(workspace.root))
    assert what == found()
    assert shown(what) == ["tiny has no versions yet: register a base with `copal init DIR --base SOURCE`"]
    assert not (workspace.private / "mlflow.db").exists()  # looking makes nothing
