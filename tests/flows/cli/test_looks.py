"""Commands that look at a lineage: what people read, what programs read with `--json`, pictures, an export."""

from __future__ import annotations

import json

import pytest
from mlflow import MlflowClient

from flows.step.run import plain_tasks, run_step
from support.benches import text

PICTURES = {
    f"{name}.{kind}"
    for name in ("perplexity-matrix", "forgetting", "layer-error", "response-shift", "sparsity-by-layer")
    for kind in ("png", "svg")
}


@pytest.fixture(scope="module")
def lineage(make_bench, tmp_path_factory):
    """Three versions with pictures; the last one failed a gate."""
    made = make_bench(tmp_path_factory.mktemp("looks") / "workspace")
    made.set("registry: {pictures: false}", "gates: {dense: 0.01}")
    for seed, domain in enumerate(("code", "legal")):
        made.commit(domain, seed)
        assert run_step(made.project, domain, None, plain_tasks())
    return made


def test_plot_writes_each_picture_as_png_and_svg_and_tells_the_files(lineage, run, tmp_path):
    code, out, _ = run("plot", "latest", "--out", tmp_path / "new" / "pictures", "--workspace", lineage.root)
    assert code == 0
    assert {line.rpartition("/")[2] for line in out.splitlines()} == PICTURES
    for line in out.splitlines():
        written = (tmp_path / "new" / "pictures" / line.rpartition("/")[2]).read_bytes()
        assert written.startswith(b"\x89PNG" if line.endswith("png") else b"<?xml")


def test_plot_refuses_what_it_cannot_draw_or_write(lineage, refused, tmp_path):
    (tmp_path / "file").write_text("mine")
    here = ("--workspace", lineage.root)
    assert "is a file; name a folder" in refused("plot", "--out", tmp_path / "file", *here)
    assert "nothing to draw yet" in refused("plot", "1", "--out", tmp_path / "pictures", *here)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_version_has_the_same_pictures_in_mlflow(lineage):
    shown = MlflowClient(lineage.registry.tracking_uri).list_artifacts(lineage.registry.version(3).run_id)
    assert {file.path for file in shown if file.path.endswith((".png", ".svg"))} == PICTURES


def test_the_first_line_of_an_export_says_which_gates_failed(lineage, run, tmp_path):
    code, out, _ = run("export", "3", tmp_path / "model", "--workspace", lineage.root)
    assert code == 0
    first, last = out.splitlines()
    assert first.startswith("version 3 of tiny: ")
    assert "failed" in first
    assert "dense" in first
    assert last == f"{tmp_path / 'model'}: version 3 of tiny"


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ("status", "versions"),
        ("status 3", "domains"),
        ("status --all", "lineages"),
        ("plan", "steps"),
        ("gates 3", "details"),
        ("lineage", "versions"),
        ("audit used code", None),
        ("audit data --alias latest", None),
        ("audit diff 2 3", None),
        ("audit worse", None),
        ("verify 3", "checked"),
        ("replay 3 --last-step", "identical"),
        ("gc --dry-run", "freed"),
        ("doctor", "checks"),
    ],
)
def test_what_people_read_as_a_table_programs_read_as_json(lineage, run, words, key):
    read, (_, shown, _) = (run(*words.split(), *extra, "--workspace", lineage.root) for extra in (("--json",), ()))
    found = json.loads(read[1])
    assert found
    assert key is None or key in found
    with pytest.raises(json.JSONDecodeError):
        json.loads(shown)


def test_sizes_reads_as_json_too(lineage, run):
    assert json.loads(run("sizes", lineage.base, "--json")[1])


def test_add_tells_what_calibrates_what_the_step_takes_and_the_next_command(lineage, run, tmp_path):
    lineage.write("third", 7)
    source = (lineage.workspace.data / "third").rename(tmp_path / "third")
    (source / "again.txt").write_text(text(7, 0))
    code, out, _ = run("add", "third", source, "--workspace", lineage.root)
    assert code == 0
    told, repeated, committed, takes, following = out.splitlines()
    assert told.startswith("data/third: 24 documents in 2 files, ")
    assert repeated == "1 more document repeats the text of another one, which counts once"
    assert "calibrate (8 windows)" in told
    assert "evaluate (8 windows)" in told
    assert committed.endswith(": data/third.dvc")
    assert takes.startswith("version 4 will take about ")
    assert following == f"next: copal watch --once --workspace {lineage.root}"
    found = json.loads(run("add", "fourth", source, "--json", "--workspace", lineage.root)[1])
    assert (found["domain"], found["files"]) == ("fourth", 2)
