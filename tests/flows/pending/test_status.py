from __future__ import annotations

import io

from rich.console import Console

from flows.pending.status import status
from flows.project import open_project
from flows.start.init import init_workspace
from flows.terminal.status import render_status


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
    return made | more


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


def shown(what: dict) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=120).print(render_status(what))
    return [line.rstrip() for line in stream.getvalue().splitlines()]


def cells(what: dict) -> list[list[str]]:
    rows = (line.replace("┃", "│") for line in shown(what) if line[:1] in "┃│")
    return [[cell.strip() for cell in row.strip("│").split("│")] for row in rows]


def test_a_row_a_version_and_a_column_a_domain():
    assert cells(
        found(
            version(1, None, {}, {}),
            version(2, "legal", {"legal": 20.0}, {"legal": 11.0}),
            version(
                3,
                "code",
                {"legal": 21.5, "code": 8.4},
                {"legal": 11.0, "code": 6.76},
                weights_back=12345,
                gates="passed",
                aliases=["challenger", "latest"],
            ),
        )
    ) == [
        ["version", "adapted to", "legal", "code", "sparsity", "came back", "seconds", "gates", "aliases"],
        ["1", "dense base", "11.00", "6.76", "0.0000", "", "", "", ""],
        ["2", "legal", "20.00", "", "0.5000", "", "6", "", ""],
        ["3", "code", "21.50", "8.40", "0.5000", "12,345", "6", "passed", "challenger, latest"],
    ]


def test_what_the_newest_version_failed_stands_below():
    why = {"dense": "code: 30, 6.76 in the dense base"}
    one, two = (version(n, "code", {}, {}, gates="failed", failed=why) for n in (2, 3))
    assert shown(found(one, two))[-1] == "version 3 failed dense: code: 30, 6.76 in the dense base"
    assert not any("version 2 failed" in line for line in shown(found(one, two)))


def test_a_figure_on_other_data_of_the_domain_is_marked():
    what = found(
        version(1, None, {}, {}),
        version(2, "code", {"code": 9.0}, {"code": 7.0}),
        version(3, "code", {"code": 8.0}, {"code": 6.0}, weights_back=0),
    )
    assert [row[2] for row in cells(what)] == ["code", "6.00", "9.00*", "8.00"]
    assert [row[4] for row in cells(what)] == ["came back", "", "", "0"]
    assert "* measured on other data" in "\n".join(shown(what))
    del what["versions"][1]
    assert "* measured" not in "\n".join(shown(what))


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
    assert " ".join(lines[-7:]).split("pending: ")[1].split(" refused: ")[0] == (
        "code at 0123456789 waiting for data: law at abcdef0123, looked for 2 times since 2026-01-01T00:00:00+00:00, "
        "again at 2026-01-01T00:02:00+00:00; run `dvc push` where the data is"
    )
    assert lines[-3:] == [
        "refused: bad at 0011223344 since 2026-01-01T00:00:00+00:00: data/bad/a.jsonl, line 1: no field text",
        "note: data/legal is no longer tracked here",
        "problem: data/[Bad]: '[Bad]' cannot name a domain",
    ]


def test_a_workspace_without_versions(tmp_path):
    workspace = init_workspace(tmp_path / "new", "tiny")
    what = status(open_project(workspace.root))
    assert what == found()
    assert shown(what) == ["tiny has no versions yet: register a base with `copal init DIR --base SOURCE`"]
    assert not (workspace.private / "mlflow.db").exists()  # looking makes nothing
