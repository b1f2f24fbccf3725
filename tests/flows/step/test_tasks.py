"""Tasks of domains: asked of the version and of the dense base, recorded, shown and judged; what may not be asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient

from copal.errors import CopalError, DataError, ResourceError, SettingsError
from copal.progress import Progress
from flows.data import task_files
from flows.data.dataset import UnusableDataError
from flows.data.task_files import read_tasks
from flows.lineage.record import Record
from flows.lineage.scores import scores
from flows.models.card import model_card
from flows.pending.forecast import forecast
from flows.project import read_history
from flows.step import harness, launch, resources, tasks
from flows.step.launch import Fault
from flows.step.staging import Evaluation, evaluation_text, staged_evaluation
from flows.terminal.status import render_scores
from support.benches import Bench
from support.tasks import TASK, write_task
from support.toys import step


def here(module: str, folder: Path, progress: Progress, environment: Mapping[str, str]) -> Fault | None:
    """In place of a process of its own, which takes seconds to begin."""
    if harness._main(folder) == 0:
        return None
    return Fault.from_text(next(folder.glob("error-*.json")).read_text())


@dataclass(frozen=True)
class Taken:
    bench: Bench
    records: dict[int, Record]
    asked: dict[int, list[tuple[str, int]]]  # by version: of which model how many tasks


@pytest.fixture(scope="module")
def taken(make_bench: Callable[..., Bench], tmp_path_factory: pytest.TempPathFactory) -> Taken:
    """Version 2: code without tasks; 3: legal with one; 4: other text of code."""
    bench = make_bench(tmp_path_factory.mktemp("tasks") / "workspace")
    records: dict[int, Record] = {}
    asked: dict[int, list[tuple[str, int]]] = {}
    with pytest.MonkeyPatch.context() as patch:

        def run(module: str, folder: Path, progress: Progress, environment: Mapping[str, str]) -> Fault | None:
            number, models = len(records) + 2, json.loads((folder / harness.REQUEST_FILE).read_text())["models"]
            if not models:
                return here(module, folder, progress, environment)
            asked[number] = [(Path(model["folder"]).parent.name, len(model["tasks"])) for model in models]
            run = real if number == 3 else here
            return run(module, folder, progress, environment)

        real = launch.run_alone
        patch.setattr(launch, "run_alone", run)
        for domain, seed in (("code", 0), ("legal", 1), ("code", 2)):
            bench.write(domain, seed)
            if domain == "legal":
                write_task(bench.root / "data" / domain, seed=seed)
            bench.track(domain)
            made = step(bench, domain)
            assert made is not None
            records[made.number] = bench.registry.record(made.version)
    return Taken(bench=bench, records=records, asked=asked)


def test_figures_of_the_version_and_of_the_dense_base_are_recorded_by_domain_and_task(taken):
    found = taken.records[3].tasks["legal"]["dialect"]
    assert (found.documents, found.metric, found.higher_is_better) == (12, "acc", True)
    for figures in (found.figures, found.dense):
        assert figures.keys() == {"acc"}
        assert 12 * figures["acc"] == pytest.approx(round(12 * figures["acc"]))


def test_a_version_without_tasks_has_the_record_that_it_always_had(taken):
    assert "tasks" not in taken.records[2].as_json()
    assert 2 not in taken.asked


def test_what_the_lineage_knows_of_the_dense_base_is_not_asked_again(taken):
    assert [count for _, count in taken.asked[3]] == [1, 1]
    assert [count for _, count in taken.asked[4]] == [1]
    assert taken.records[4].tasks["legal"]["dialect"].dense == taken.records[3].tasks["legal"]["dialect"].dense


def test_figures_are_metrics_of_the_run_rows_of_status_and_in_the_card(taken):
    bench, found = taken.bench, taken.records[3].tasks["legal"]["dialect"]
    client = MlflowClient(tracking_uri=bench.registry.tracking_uri)
    metrics = client.get_run(bench.registry.version(3).run_id).data.metrics
    assert metrics["task.legal.dialect.acc"] == found.figures["acc"]
    assert metrics["dense_task.legal.dialect.acc"] == found.dense["acc"]
    told = scores(read_history(bench.project), "3")
    assert told["tasks"] == [
        {"domain": "legal", "task": "dialect", "metric": "acc", "documents": 12}
        | {"figure": found.figures["acc"], "dense": found.dense["acc"]}
    ]
    assert "dialect" in shown(told)
    assert "| legal | dialect | acc | 12 |" in model_card(3, taken.records[3], None)
    assert "questions" not in shown(scores(read_history(bench.project), "2"))
    assert "## Tasks" not in model_card(2, taken.records[2], None)


def shown(told: dict) -> str:
    from rich.console import Console

    console = Console(width=80, record=True, file=None)
    with console.capture() as captured:
        console.print(render_scores(told))
    return captured.get()


def test_what_was_asked_is_staged_with_the_rest_of_the_evaluation(taken, tmp_path):
    record = taken.records[3]
    whole = Evaluation(
        perplexity=record.perplexity,
        dense=record.dense_perplexity,
        before=None,
        domains=record.domains,
        tasks=record.tasks,
        seconds=1.0,
    )
    (tmp_path / "evaluation.json").write_text(evaluation_text(whole))
    place = type("Step", (), {"run": tmp_path})()
    assert staged_evaluation(place) == whole
    (tmp_path / "evaluation.json").write_text(evaluation_text(whole).replace('"acc": ', '"acc": "much", "other": '))
    assert staged_evaluation(place) is None


# --- what is refused, before anything is pruned


def refused(bench: Bench, error: type[CopalError]) -> str:
    before = len(bench.registry.versions())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flows.step.run.prune_domain", lambda *_: pytest.fail("it prunes"))
        with pytest.raises(error) as found:
            step(bench, "medical")
    assert len(bench.registry.versions()) == before
    assert "\n" not in str(found.value)
    return str(found.value)


def test_a_step_whose_tasks_cannot_be_asked_is_refused_before_it_prunes(taken, monkeypatch):
    bench = taken.bench
    bench.write("medical", 3)
    write_task(bench.root / "data" / "medical")
    bench.track("medical")
    assert [step["tasks"] for step in forecast(bench.project)["steps"]] == [2], "legal's, and those that come"
    monkeypatch.setattr(tasks, "harness_version", lambda: None)
    assert "tasks needs lm-evaluation-harness, which is not installed: pip install 'copal[tasks]'" in refused(
        bench, SettingsError
    )
    monkeypatch.undo()

    write_task(bench.root / "data" / "medical", TASK.replace("acc\n", "acc\n    hf_evaluate: !function utils.score\n"))
    bench.track("medical")
    said = refused(bench, UnusableDataError)
    assert said.startswith("data/medical/tasks/dialect.yaml, line 13: '!function' names code")

    monkeypatch.setattr(launch, "run_alone", here)
    write_task(bench.root / "data" / "medical", TASK.replace("{{question}}", "{{answered}}"))
    bench.track("medical")
    said = refused(bench, UnusableDataError)
    assert said.startswith("task dialect of data/medical cannot be asked: UndefinedError: 'answered' is undefined")


def test_a_model_that_does_not_fit_into_memory_is_refused(taken, monkeypatch):
    monkeypatch.setattr(resources, "free_memory", lambda: 1000)
    with pytest.raises(ResourceError, match="need the whole model in memory"):
        resources.check_whole_model(taken.bench.settings, taken.bench.base)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ question.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
    ],
)
def test_a_template_does_not_reach_python(tmp_path, template):
    write_task(tmp_path, TASK.replace("{{question}}", template))
    config = read_tasks("code", tmp_path)[0].config
    request = {"tasks": [{"domain": "code", "config": config}], "models": [], "limit": None}
    (tmp_path / harness.REQUEST_FILE).write_text(json.dumps(request))
    fault = here("", tmp_path, lambda *_: None, {})
    assert fault is not None
    assert "SecurityError" in fault.arguments[0]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("task: dialect", "task: !!python/object/apply:os.system ['true']", "line 1: 'tag:yaml.org,2002:python/"),
        ("task: dialect", "class: !function a.B\ntask: dialect", "line 1: '!function' names code"),
        ("task: dialect", "task: ../dialect", "task must be a name"),
        ("task: dialect", "task: [", "is not YAML"),
        ("task: dialect", "task: &a dialect\nmetadata: {2026-01-01: *a}", "no text, number, list or mapping"),
        ("task: dialect", "include: /etc/passwd\ntask: dialect", "include is not passed on"),
        ("task: dialect", "process_docs: utils.docs\ntask: dialect", "process_docs is not passed on"),
        ("task: dialect", "unsafe_code: true\ntask: dialect", "unsafe_code is not passed on"),
        ("dataset_path: json", "dataset_path: openbookqa", "dataset_path must be one of json"),
        ("metric: acc", "metric: ./metric.py", "metric './metric.py' must be one of acc"),
        (
            "task: dialect",
            "generation_kwargs: {custom_generate: .}\ntask: dialect",
            "generation_kwargs may have do_sample",
        ),
        ("task: dialect", "generation_kwargs: {do_sample: true}\ntask: dialect", "must leave do_sample false"),
        ("metric: acc", "metric: [acc]", "metric ['acc'] must be one of acc"),
        ("metric: acc", "metric: word_perplexity", "must be one of acc, acc_norm"),
        ("aggregation: mean", "aggregation: nonesuch", "aggregation of acc must be mean"),
        ("higher_is_better: true", "higher_is_better: false", "higher_is_better of acc must be True"),
        ("output_type: multiple_choice", "output_type: generate", "output_type must be one of multiple_choice"),
        ("    aggregation: mean", "    hf_evaluate: true", "hf_evaluate of a metric is not passed on"),
        ("test: questions.jsonl", "test: ../documents.jsonl", "does not lie in the folder tasks"),
        ("test: questions.jsonl", "test: https://example.org/rows.jsonl", "is not there, or is no file"),
        ("test: questions.jsonl", "test: '*.jsonl'", "is not there, or is no file"),
        ("  data_files:", "  trust_remote_code: true\n  data_files:", "dataset_kwargs must be data_files"),
        ("test: questions.jsonl", "test: []", "dataset_kwargs must be data_files"),
    ],
)
def test_what_names_code_the_hub_or_files_elsewhere_is_refused_by_file(tmp_path, old, new, says):
    (tmp_path / "documents.jsonl").write_text("{}")
    assert old in TASK
    write_task(tmp_path, TASK.replace(old, new))
    with pytest.raises(DataError) as found:
        read_tasks("code", tmp_path)
    assert str(found.value).startswith("data/code/tasks/dialect.yaml")
    assert says in str(found.value)


def test_what_is_known_of_metrics_is_what_the_harness_says():
    from lm_eval.api import metrics as _metrics  # registers them
    from lm_eval.api.registry import AGGREGATION_REGISTRY, get_metric, get_metric_aggregation, is_higher_better

    assert _metrics
    for metric in {one for metrics in task_files._METRICS_OF.values() for one in metrics}:
        assert get_metric(metric) is not None
        assert is_higher_better(metric) is (metric not in task_files._LESS_IS_BETTER)
        aggregation = task_files._AGGREGATION.get(metric, "mean")
        assert get_metric_aggregation(metric) is AGGREGATION_REGISTRY[aggregation]


def test_a_link_that_leaves_the_folder_is_refused(tmp_path):
    place = write_task(tmp_path)
    (tmp_path / "elsewhere.jsonl").write_bytes((place / "questions.jsonl").read_bytes())
    (place / "questions.jsonl").unlink()
    (place / "questions.jsonl").symlink_to(tmp_path / "elsewhere.jsonl")
    with pytest.raises(DataError, match="does not lie in the folder tasks"):
        read_tasks("code", tmp_path)


def test_other_questions_are_another_task(tmp_path):
    digests = set()
    for number, (yaml, questions) in enumerate([(TASK, 12), (TASK, 11), (TASK.replace("{{q", "Q: {{q"), 12)]):
        write_task(tmp_path / str(number), yaml, questions=questions)
        digests |= {read_tasks("code", tmp_path / str(number))[0].digest}
    assert len(digests) == 3
    write_task(tmp_path / "elsewhere")
    assert read_tasks("code", tmp_path / "elsewhere")[0].digest in digests
