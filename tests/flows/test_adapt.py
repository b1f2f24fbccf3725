"""The flows on a tiny model, through Prefect's harness, with real git, DVC and MLflow."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest
import torch

from copal.errors import CopalError, DataError
from flows.adapt import adapt
from flows.data.dataset import DatasetError, MissingDataError
from flows.pending.plan import plan
from flows.pending.take_up import RefusedError
from flows.registry.errors import LineageConflictError
from flows.step.work import prune_domain
from flows.watch import watch
from support.toys import expire_claims, other_masks, weights

pytestmark = pytest.mark.usefixtures("prefect")


def pending(bench) -> list[str]:
    return [version.domain for version in plan(bench.project).pending]


def test_three_commits_end_in_three_versions_in_the_order_of_the_commits(bench):
    for seed, domain in enumerate(("zoo", "code", "legal")):  # not in the order of their names
        bench.commit(domain, seed)
    assert pending(bench) == ["zoo", "code", "legal"]

    assert watch(str(bench.root)) == [2, 3, 4]

    assert pending(bench) == []
    registry = bench.registry
    records = [registry.record(version) for version in registry.versions()]
    assert [record.step and record.step.name for record in records] == [None, "zoo", "code", "legal"]
    assert [[d.name for d in record.domains] for record in records][3] == ["code", "legal", "zoo"]
    assert [d.contribution_version for d in records[3].domains] == [3, None, 2]
    assert records[3].parent.version == 3
    assert records[3].perplexity.keys() == records[3].dense_perplexity.keys() == {"zoo", "code", "legal"}
    assert records[3].sparsity.target == 0.5
    assert records[3].sparsity.counted == pytest.approx(0.5, abs=1e-6)
    assert records[1].weights_back is None
    assert records[3].weights_back > 0
    assert records[3].backward_transfer is not None
    assert registry.head().number == 4
    assert not list(bench.workspace.runs.iterdir())

    assert watch(str(bench.root)) == []


def test_the_registered_figures_are_those_of_the_registered_model(bench):
    from transformers import AutoTokenizer

    from copal.calibration import domain_windows
    from copal.evaluation import evaluate

    bench.commit("code", 0)
    adapt(str(bench.root), "code")
    folder = bench.registry.folder(bench.registry.head()) / "model"
    windows = domain_windows(
        bench.root / "data" / "code", AutoTokenizer.from_pretrained(folder), bench.settings.calibration
    )
    score = evaluate(folder, {"code": windows.evaluation}, device=torch.device("cpu"), dtype=torch.float32)["code"]
    record = bench.registry.record(bench.registry.head())
    assert record.perplexity["code"] == pytest.approx(score.perplexity, rel=1e-6)
    assert record.step.evaluation_tokens == score.tokens
    assert record.perplexity_before == record.dense_perplexity["code"]  # the parent is the dense base


def test_two_orders_end_with_the_same_model(bench):
    """Through the whole job; `tests/copal/test_step.py` has all six."""
    ends = []
    params = bench.workspace.params.read_text()
    for seed, domain in enumerate(("code", "legal")):
        bench.commit(domain, seed)
    for order in (("code", "legal"), ("legal", "code")):
        bench.workspace.params.write_text(params.replace("name: tiny", f"name: {'-'.join(order)}"))
        bench.register_root()
        for domain in order:
            adapt(str(bench.root), domain)
        head = bench.registry.head()
        ends.append((weights(bench, head.number), bench.registry.record(head).perplexity))
    (one, figures), (other, other_figures) = ends
    assert other_masks(one, other) <= 1e-4
    assert figures == pytest.approx(other_figures, rel=1e-3)


def test_a_new_version_replaces_the_old_one_and_going_back_works_too(bench):
    bench.commit("code", seed=0)
    bench.commit("legal", seed=1)
    watch(str(bench.root))
    first = weights(bench, 3)
    bench.commit("code", seed=2)
    assert pending(bench) == ["code"]
    watch(str(bench.root))
    assert other_masks(first, weights(bench, 4)) > 0.01
    bench.commit("code", seed=0)
    watch(str(bench.root))
    assert other_masks(first, weights(bench, 5)) <= 1e-4
    records = [bench.registry.record(version) for version in bench.registry.versions()]
    assert [record.step.dvc_md5 for record in records[1:]] == [
        records[1].step.dvc_md5, records[2].step.dvc_md5,
        records[3].step.dvc_md5, records[1].step.dvc_md5,
    ]  # fmt: skip


def test_earlier_domains_are_evaluated_at_the_data_version_of_the_lineage(bench):
    bench.commit("code", seed=0)
    watch(str(bench.root))
    known = bench.registry.record(bench.registry.head()).domains[0]
    bench.commit("code", seed=2)
    bench.commit("legal", seed=1)
    adapt(str(bench.root), "legal")  # by hand, before the watcher took the new code
    code = next(d for d in bench.registry.record(bench.registry.head()).domains if d.name == "code")
    assert (code.dvc_md5, code.evaluation_digest) == (known.dvc_md5, known.evaluation_digest)
    assert pending(bench) == ["code"]


def test_the_same_data_twice_makes_one_version(bench):
    bench.commit("code", 0)
    assert adapt(str(bench.root), "code") == 2
    assert adapt(str(bench.root), "code") is None
    assert len(bench.registry.versions()) == 2


def test_an_older_revision_can_be_asked_for(bench):
    old = bench.commit("code", 0)
    bench.commit("code", 1)
    assert adapt(str(bench.root), "code", old) == 2
    assert bench.registry.record(bench.registry.head()).step.git_rev == old


def test_a_step_never_touches_the_work_tree(bench):
    bench.commit("code", 0)
    bench.write("code", seed=5)  # an edit that nobody committed
    before = (bench.root / "data" / "code" / "documents.jsonl").read_text()
    watch(str(bench.root))
    assert (bench.root / "data" / "code" / "documents.jsonl").read_text() == before


def test_a_deleted_pointer_is_noted_and_changes_nothing(bench):
    bench.commit("code", 0)
    watch(str(bench.root))
    git = ["git", "-C", str(bench.root), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "rm", "-q", "data/code.dvc"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "Remove code"], check=True)
    found = plan(bench.project)
    assert not found.pending
    assert "data/code is no longer tracked" in found.notes[0]


def test_a_check_that_finds_nothing_needs_neither_prefect_nor_torch(bench):
    bench.commit("code", 0)
    watch(str(bench.root))
    program = (
        "import sys; from pathlib import Path\n"
        "from flows.pending.plan import plan; from flows.project import open_project\n"
        "project = open_project(sys.argv[1])\n"
        "assert not plan(project).pending\n"
        "print([name for name in ('torch', 'prefect') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program, str(bench.root)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- bad input: one clear line, and nothing changes


def refused(bench, error: type[CopalError], match: str, domain: str = "code") -> None:
    before, versions = bench.snapshot(), bench.registry.versions()
    with pytest.raises(error, match=match) as caught:
        adapt(str(bench.root), domain)
    assert "\n" not in str(caught.value)
    assert bench.snapshot() == before
    assert bench.registry.versions() == versions


def test_too_few_tokens(bench):
    bench.commit("code", 0, documents=3)
    refused(bench, DataError, r"^data/code has \d+ tokens .* \d+ are needed")


def test_an_empty_folder(bench):
    (bench.root / "data" / "code").mkdir(parents=True)
    (bench.root / "data" / "code" / "README.md").write_text("nothing yet")
    bench.track("code")
    refused(bench, DataError, "code")


def test_a_file_that_is_not_utf8(bench):
    bench.write("code", 0)
    (bench.root / "data" / "code" / "latin.txt").write_bytes("für".encode("latin-1") * 50)
    bench.track("code")
    refused(bench, DataError, r"data/code/latin\.txt.*UTF-8")


def test_rows_without_text(bench):
    bench.write("code", 0)
    (bench.root / "data" / "code" / "more.jsonl").write_text('{"body": "hello"}\n')
    bench.track("code")
    refused(bench, DataError, r"data/code/more\.jsonl.*text")


def test_a_pointer_whose_data_is_nowhere(bench):
    bench.commit("code", 0)
    bench.lose_data()
    refused(bench, MissingDataError, r"data/code.*dvc push")


def test_a_name_that_no_domain_may_have(bench):
    refused(bench, DataError, "cannot name a domain", domain="Code!")


def test_a_domain_that_is_not_tracked(bench):
    refused(bench, DatasetError, "legal", domain="legal")


def test_another_sparsity_under_the_same_name(bench):
    bench.commit("code", 0)
    watch(str(bench.root))
    bench.commit("legal", 1)
    bench.set("prune: {iterations: 30}", "prune: {iterations: 30, sparsity: 0.6}")
    refused(bench, LineageConflictError, "another sparsity", domain="legal")


def test_other_calibration_settings_than_the_state_was_made_with(bench):
    bench.commit("code", 0)
    watch(str(bench.root))
    bench.commit("legal", 1)
    bench.set("windows: 8, e", "windows: 9, e")
    refused(bench, CopalError, "other calibration settings", domain="legal")


def test_one_bad_dataset_does_not_keep_the_others_waiting(bench):
    bench.commit("bad", 0, documents=3)
    bench.commit("Wrong Name".replace(" ", ""), 1)
    bench.commit("code", 2)
    with pytest.raises(RefusedError, match=r"WrongName.*cannot name a domain.*data/bad has .* needed"):
        watch(str(bench.root))
    assert [bench.registry.record(v).step and v.tags["copal.domain"] for v in bench.registry.versions()] == [
        None,
        "code",
    ]


def test_a_step_that_was_taken_over_publishes_nothing(bench, monkeypatch):
    bench.commit("code", 0)
    bench.commit("legal", 1)
    real = prune_domain

    def meanwhile(settings, step, data, progress):
        monkeypatch.setattr("flows.step.run.prune_domain", real)
        expire_claims(bench.project)  # as if it had been paused
        assert adapt(str(bench.root), "legal") == 2
        return real(settings, step, data, progress)

    monkeypatch.setattr("flows.step.run.prune_domain", meanwhile)
    with pytest.raises(CopalError):
        adapt(str(bench.root), "code")
    assert [v.tags.get("copal.domain") for v in bench.registry.versions()] == [None, "legal"]
    assert adapt(str(bench.root), "code") == 3  # from version 2; what the late step had staged is no use any more
    assert not list(bench.workspace.runs.iterdir())


def test_the_flow_runs_the_gates_and_shows_them(make_learnt_bench, tmp_path, caplog, monkeypatch):
    from prefect.artifacts import Artifact

    bench = make_learnt_bench(tmp_path / "learnt")
    log = logging.getLogger("prefect.flow_runs")
    monkeypatch.setattr(log, "handlers", [*log.handlers, caplog.handler])
    caplog.set_level(logging.INFO, logger=log.name)
    assert [adapt(str(bench.root), domain) for domain in ("code", "legal")] == [2, 3]
    head = bench.registry.head()
    assert head.gates == "passed"
    told = [vars(record) for record in caplog.records if hasattr(record, "copal_version")]  # what a log in JSON has
    fields = ("copal_model", "copal_version", "copal_domain", "copal_key")
    assert [told[-1][name] for name in fields] == ["tiny", 3, "legal", head.key]
    assert bench.registry.alias("challenger") == 3
    assert bench.registry.alias("champion") is None
    shown = Artifact.get("tiny-gates")
    assert shown.type == "table"
    assert shown.description == "tiny version 3: all 8 gates passed"
    assert {row[""] for row in json.loads(shown.data)} == {"passed"}
    figures = Artifact.get("tiny-perplexity")
    assert figures.type == "table"
    assert "tiny version 3: perplexity by domain. Sparsity as counted 0.5000" in figures.description
    record = bench.registry.record(bench.registry.head())
    assert {row["domain"]: row["this version"] for row in json.loads(figures.data)} == {
        domain: round(value, 2) for domain, value in record.perplexity.items()
    }


def test_gates_that_a_run_did_not_come_to_are_run_by_the_next(bench, monkeypatch):
    bench.commit("code", 0)
    with monkeypatch.context() as patch:
        patch.setattr("flows.step.run.run_gates", lambda *_: 1 / 0)
        patch.setattr("flows.runs.tasks.PAUSES", ())
        with pytest.raises(ZeroDivisionError):
            adapt(str(bench.root), "code")
    assert not bench.registry.head().concluded
    assert adapt(str(bench.root), "code") is None
    assert bench.registry.head().concluded
    assert [entry.kind for entry in bench.log] == ["gates"]
