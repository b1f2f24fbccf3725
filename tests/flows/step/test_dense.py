"""The dense base's figures: what the lineage knows is not measured again, and is what measuring again would give."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from transformers import AutoTokenizer

from copal.calibration import domain_windows
from copal.evaluation import evaluate
from flows.lineage.record import RECORD_FILE, Base, Record, read_record, write_record
from flows.registry.registry import Registry
from flows.registry.versions import ModelVersion
from flows.step import distributed
from flows.step.dense import known_figures
from support.benches import Bench
from support.registries import a_record, a_registry, staged
from support.toys import step


@dataclass(frozen=True)
class Taken:
    """A step: the domains of each of its walks, those over the dense base apart; its record; and what the dense base
    gives on its domains when they are measured directly."""

    dense: list[tuple[str, ...]]
    pruned: list[tuple[str, ...]]
    record: Record
    measured: dict[str, float]


@pytest.fixture(scope="module")
def steps(make_bench: Callable[..., Bench], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Taken]:
    """By the version that each made: code, legal, other data of code in bfloat16, the first again in float32, and
    medical with one evaluation window more."""
    bench = make_bench(tmp_path_factory.mktemp("dense") / "workspace")
    root = bench.registry.root()
    assert root is not None
    base, taken = bench.registry.folder(root) / "model", {}
    with pytest.MonkeyPatch.context() as patch:

        def take(domain: str, seed: int, domains: list[str], dtype: torch.dtype = torch.float32) -> None:
            walks: list[tuple[Path, tuple[str, ...]]] = []

            def spy(checkpoint, windows, **settings):
                walks.append((checkpoint, tuple(windows)))
                return evaluate(checkpoint, windows, **settings)

            patch.setattr(distributed, "evaluate", spy)
            bench.commit(domain, seed)
            made = step(bench, domain)
            assert made is not None
            taken[made.number] = Taken(
                dense=[walked for checkpoint, walked in walks if checkpoint == base],
                pruned=[walked for checkpoint, walked in walks if checkpoint != base],
                record=bench.registry.record(made.version),
                measured=measure(bench, base, domains, dtype),
            )

        take("code", 0, ["code"])
        take("legal", 1, ["code", "legal"])
        bench.set("float32", "bfloat16")
        take("code", 2, ["code", "legal"], torch.bfloat16)
        bench.set("bfloat16", "float32")
        take("code", 0, ["code", "legal"])
        bench.set("evaluation_windows: 8", "evaluation_windows: 9")
        take("medical", 3, ["code", "legal", "medical"])
    return taken


def measure(bench: Bench, base: Path, domains: list[str], dtype: torch.dtype) -> dict[str, float]:
    tokenizer, settings = AutoTokenizer.from_pretrained(base), bench.settings.calibration
    windows = {name: domain_windows(bench.root / "data" / name, tokenizer, settings).evaluation for name in domains}
    scores = evaluate(base, windows, device=torch.device("cpu"), dtype=dtype)
    return {name: score.perplexity for name, score in scores.items()}


def test_the_second_step_scores_the_dense_base_on_its_new_domain_alone(steps):
    assert steps[2].dense == [("code",)]
    assert steps[3].dense == [("legal",)]


def test_all_domains_of_a_version_are_scored_in_one_walk(steps):
    assert [steps[version].pruned for version in (2, 3, 6)] == [
        [("code",)],
        [("code", "legal"), ("legal",)],  # the parent, on the new domain
        [("code", "legal", "medical"), ("medical",)],
    ]


def test_figures_that_were_handed_on_are_those_measured_directly_to_the_last_bit(steps):
    for version, taken in steps.items():
        assert taken.record.dense_perplexity == taken.measured, version


def test_another_dtype_is_measured_anew_on_every_domain(steps):
    assert steps[4].dense == [("code", "legal")]
    assert steps[4].record.dense_perplexity["legal"] != steps[3].record.dense_perplexity["legal"]


def test_data_that_comes_back_and_the_first_dtype_are_known_from_earlier_versions(steps):
    assert steps[5].dense == []
    assert steps[5].record.dense_perplexity == steps[3].record.dense_perplexity
    assert steps[5].record.perplexity_before is not None


def test_other_evaluation_windows_are_measured_anew(steps):
    assert steps[6].dense == [("code", "legal", "medical")]
    assert steps[6].record.dense_perplexity["code"] != steps[5].record.dense_perplexity["code"]


@pytest.fixture
def registry(tmp_path: Path, mlflow_template: Path) -> Registry:
    shutil.copy(mlflow_template, tmp_path / "mlflow.db")
    return a_registry(tmp_path)


def publish(
    registry: Registry, folder: Path, parent: ModelVersion | None, figure: float | None, dtype: str | None, **values
) -> ModelVersion:
    """A version of code whose record says so of the dense base; None: the root."""
    dense = {} if figure is None else {"code": figure}
    hardware = {} if dtype is None else {"dtype": dtype}
    staged(folder, f"{figure} {dtype}")
    record = a_record(folder, parent, list(dense), dense_perplexity=dense, hardware=hardware, **values)
    return registry.register(folder, record, parent=parent, expected_head=None if parent is None else parent.number)


def test_a_figure_counts_in_the_dtype_of_the_record_that_had_it_first(registry, tmp_path):
    """An earlier copal handed figures on whatever the dtype was."""
    version = publish(registry, tmp_path / "root", None, None, "float32")
    found = []
    for number, (figure, dtype) in enumerate(
        [
            (6.0, "bfloat16"),
            (6.0, "float32"),
            (6.25, "float32"),
            (6.5, None),
        ]  # handed on; measured; in nobody knows what
    ):
        version = publish(registry, tmp_path / str(number), version, figure, dtype)
        found.append([list(known_figures(registry, version, dtype).values()) for dtype in ("bfloat16", "float32")])
    assert found == [[[6.0], []], [[6.0], []], [[6.0], [6.25]], [[6.0], [6.25]]]


def test_the_figures_of_another_base_are_its_own(registry, tmp_path):
    root = publish(registry, tmp_path / "root", None, None, "float32")
    assert known_figures(registry, publish(registry, tmp_path / "code", root, 6.0, "float32"), "float32")
    other = a_registry(tmp_path, "other")
    theirs = {"model": "other", "base": Base(fingerprint="d" * 64, source="another folder")}
    assert known_figures(other, publish(other, tmp_path / "theirs", None, None, "float32", **theirs), "float32") == {}


@pytest.mark.parametrize("what", ["gone", "altered", "altered, and its digest in the registry"])
def test_a_record_that_is_gone_or_was_altered_costs_time_and_no_figure(registry, tmp_path, what):
    version = publish(registry, tmp_path / "root", None, None, "float32")
    for number, (figure, dtype) in enumerate([(6.0, "float32"), (6.25, "bfloat16")]):
        version = publish(registry, tmp_path / str(number), version, figure, dtype)
    assert list(known_figures(registry, version, "float32").values()) == [6.0]

    path = registry.folder(registry.version(2)) / RECORD_FILE
    record = read_record(path).model_copy(update={"dense_perplexity": {"code": 1.5}})
    path.unlink()
    if what != "gone":
        write_record(path, record)
    if what.endswith("in the registry"):
        client = MlflowClient(tracking_uri=registry.tracking_uri, registry_uri=registry.tracking_uri)
        client.set_model_version_tag("tiny", "2", "copal.lineage_digest", record.digest)
    anew = a_registry(tmp_path)
    assert known_figures(anew, anew.version(3), "float32") == {}
    assert list(known_figures(anew, anew.version(3), "bfloat16").values()) == [6.25]
