"""`copal watch`, `adapt`, `status` and, after them, `export`: real git, DVC and MLflow, and once Prefect."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import threading
import time

import pytest

from copal.errors import DataError
from flows.cli.promotion import export
from flows.cli.watching import watch_forever
from flows.data.git import git


def test_the_main_job_from_the_command_line(bench, run, refused, tmp_path):
    here = ("--workspace", bench.root)
    code, out, err = run("watch", "--once", *here)
    assert (code, err) == (0, "")
    assert out == "nothing new: version 1 of tiny is the dense base, no domain is tracked under data/\n"

    bench.commit("code", 0)
    bench.commit("legal", 1)
    found = json.loads(run("status", "--json", *here)[1])
    assert [entry["domain"] for entry in found["pending"]] == ["code", "legal"]

    code, out, err = run("watch", "--once", *here)
    assert code == 0, err
    assert "version 2 of tiny: adapted to code\nversion 3 of tiny: adapted to legal\n" in out
    assert "version 3 of tiny: legal, sparsity 0.5000" in out
    code, out, err = run("watch", "--once", *here)
    assert (code, err) == (0, "")
    assert out == "nothing new: version 3 of tiny knows code, legal at their newest data versions\n"
    code, out, _ = run("adapt", "legal", *here)
    assert (code, out) == (0, "nothing to do: version 3 of tiny knows legal at this data version\n")

    found = json.loads(run("status", "--json", *here)[1])
    assert set(found) == {"model", "versions", "pending", "waiting", "refused", "notes", "problems"}
    first, _, last = found["versions"]
    assert set(last) == {
        "withdrawn",
        "version", "parent", "domain", "dvc_md5", "git_rev", "sparsity", "weights_back",
        "perplexity", "dense_perplexity", "geometric_mean", "dense_geometric_mean", "times_dense", "worst",
        "seconds", "gates", "failed", "aliases",
    }  # fmt: skip
    assert (first["parent"], first["domain"], first["perplexity"]) == (None, None, {})
    assert (last["version"], last["parent"], last["domain"]) == (3, 2, "legal")
    assert last["git_rev"] == git(bench.root, "rev-parse", "HEAD").strip()
    assert last["dvc_md5"].endswith(".dir")
    assert last["sparsity"] == pytest.approx(0.5, abs=1e-6)
    assert last["weights_back"] > 0
    assert last["perplexity"].keys() == last["dense_perplexity"].keys() == {"code", "legal"}
    assert last["seconds"].keys() == {"statistics", "solve", "evaluate"}
    assert last["aliases"] == ["latest"]

    exported = tmp_path / "out" / "pruned"
    assert run("export", "latest", exported, *here)[0] == 0
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    layers = AutoModelForCausalLM.from_pretrained(exported).model.layers
    weights = torch.cat([weight.flatten() for name, weight in layers.named_parameters() if "_proj" in name])
    assert (weights == 0).float().mean() == pytest.approx(0.5, abs=1e-3)
    assert AutoTokenizer.from_pretrained(exported)("text")["input_ids"]
    assert "is not an empty folder" in refused("export", "2", exported, *here)


@pytest.mark.usefixtures("prefect")
def test_on_a_prefect_server_a_dataset_that_is_refused_is_one_line_and_the_others_are_adapted_to(
    bench, run, monkeypatch, caplog
):
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_LOGGING_LEVEL, temporary_settings

    with get_client(sync_client=True) as client:
        before = {found.id for found in client.read_flow_runs()}  # other tests have runs on the same server
    monkeypatch.delenv("PREFECT_LOGGING_LEVEL")  # as a user has it
    bench.commit("bad", 0, documents=3)
    bench.commit("code", 1)
    with temporary_settings({PREFECT_LOGGING_LEVEL: "WARNING"}):
        code, out, err = run("watch", "--once", "--workspace", bench.root)
    assert code == 2
    assert "version 2 of tiny: adapted to code\n" in out
    assert err.startswith("copal: data/bad has ")
    assert err.count("\n") == 1
    assert not [record for record in caplog.records if record.name.startswith("prefect.")]  # no traceback of a run
    with get_client(sync_client=True) as client:
        new = [found for found in client.read_flow_runs() if found.id not in before]
        assert {client.read_flow(found.flow_id).name for found in new} == {"watch", "adapt"}


def test_adapt_refuses_before_it_starts_anything(bench, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "flows.by_hand", None)  # importing it would fail
    bench.commit("code", 0)
    here = ("--workspace", bench.root)
    assert "cannot name a domain" in refused("adapt", "Code!", *here)
    assert "tracks code" in refused("adapt", "legal", *here)
    assert "nonesuch" in refused("adapt", "code", "--rev", "nonesuch", *here)


def test_plan_says_what_would_run_and_begins_nothing(bench, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "flows.by_hand", None)  # importing it would fail
    bench.commit("code", 0)
    bench.set("prune: {iterations: 30}", "prune: {iterations: 30, sparsity: 0.6}")
    before = bench.snapshot()
    code, out, err = run("plan", "--json", "--workspace", bench.root)
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert [step["domain"] for step in found["steps"]] == ["code"]
    assert [change["name"] for change in found["settings"]] == ["prune.sparsity"]
    code, out, err = run("plan", "--workspace", bench.root)
    assert (code, err) == (0, "")
    for said in ("what would run, in this order", "prune.sparsity", "counts at the first step", "memory needed"):
        assert said in out
    assert bench.snapshot() == before


def test_watch_without_a_base(bench, run, refused):
    bench.set("name: tiny", "name: other")
    code, out, _ = run("watch", "--once", "--workspace", bench.root)
    assert (code, out) == (0, "nothing new: no domain is tracked under data/, and other has no base model yet\n")
    bench.commit("code", 0)
    assert "copal init" in refused("watch", "--once", "--workspace", bench.root)


def test_a_name_that_no_domain_may_have_is_refused_by_watch(bench, run):
    bench.commit("Code", 0)
    code, _, err = run("watch", "--once", "--workspace", bench.root)
    assert code == 2
    assert err.startswith("copal: data/Code: 'Code' cannot name a domain")


@pytest.mark.parametrize("wanted", ["7", "champion", "-1x"])
def test_export_of_a_version_that_is_not_there(bench, refused, tmp_path, wanted):
    line = refused("export", "--workspace", bench.root, "--", wanted, tmp_path / "out")
    assert wanted in line
    assert not (tmp_path / "out").exists()


def test_export_in_shards_of_no_size(refused, tmp_path):
    for size in ("5", "0GB", "-5GB", "5GiB", "5 apples", "nanGB", "", "1e9GB", f"{'9' * 400}GB"):
        assert "is no size; write 5GB" in refused("export", "1", tmp_path / "out", f"--shard-size={size}")


def test_shards_are_as_large_as_those_of_transformers_where_nobody_says_otherwise():
    from transformers import PreTrainedModel

    theirs, ours = (inspect.signature(save).parameters for save in (PreTrainedModel.save_pretrained, export))
    assert ours["shard_size"].default == theirs["max_shard_size"].default


def test_export_of_damaged_artifacts(bench, refused, tmp_path):
    model = bench.registry.folder(bench.registry.head()) / "model" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    assert "is damaged" in refused("export", "1", tmp_path / "out", "--workspace", bench.root)
    model.unlink()
    assert "is missing" in refused("export", "1", tmp_path / "out", "--workspace", bench.root)
    assert [path.name for path in tmp_path.iterdir()] == ["workspace"]


class Rounds(threading.Event):
    """An Event that is set by the wait of the last round."""

    def __init__(self, rounds: int) -> None:
        super().__init__()
        self.left, self.waited = rounds, []

    def wait(self, timeout=None):
        self.waited.append(timeout)
        self.left -= 1
        if self.left <= 0:
            self.set()
        return self.is_set()


def test_the_loop_goes_on_after_errors(capsys, caplog):
    errors = iter([None, DataError("data/x is bad"), DataError("data/x is bad"), RuntimeError("a bug"), None])
    checks = []

    def check():
        checks.append(1)
        error = next(errors)
        if error:
            raise error

    stop = Rounds(5)
    watch_forever(check, 7.5, stop)
    assert len(checks) == 5
    assert stop.waited == [7.5] * 5
    assert capsys.readouterr().err.count("copal: data/x is bad\n") == 1  # though it failed twice
    assert "a bug" in caplog.text


def test_watch_waits_as_told_and_says_what_changed_only(bench, run, monkeypatch):
    stop = Rounds(3)
    monkeypatch.setattr(threading, "Event", lambda: stop)
    code, out, _ = run("watch", "--interval", "0.5", "--workspace", bench.root)
    assert code == 0
    assert out.count("nothing new") == 1
    assert stop.waited == [0.5] * 3


def test_ctrl_c_ends_the_loop(bench, run, monkeypatch):
    class Interrupted(threading.Event):
        def wait(self, timeout=None):
            raise KeyboardInterrupt

    monkeypatch.setattr(threading, "Event", Interrupted)
    code, _, err = run("watch", "--workspace", bench.root)
    assert (code, err) == (130, "copal: interrupted\n")


def test_a_check_that_finds_nothing_starts_neither_prefect_nor_torch(bench):
    program = (
        "import sys; from flows.cli import main\n"
        "code = main(['watch', '--once', '--workspace', sys.argv[1]])\n"
        "print(code, sorted({'torch', 'prefect', 'transformers'} & set(sys.modules)))"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program, str(bench.root)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
    assert time.perf_counter() - began < 10
