from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import cost
import ingredients
import matrix
import peers
import pytest
import report
import torch
import yaml
from inputs import Inputs
from transformers import AutoModelForCausalLM

from copal.config import PruneConfig
from copal.step import Base
from flows.start.domains import DOMAINS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def inputs(make_model, make_windows, tmp_path, cpu) -> Inputs:
    return Inputs(
        base=Base(folder=make_model().rename(tmp_path / "base"), fingerprint="base"),
        calibration={name: make_windows(seed) for seed, name in enumerate(DOMAINS)},
        evaluation={name: make_windows(seed + 3) for seed, name in enumerate(DOMAINS)},
        device=cpu,
        dtype=torch.float32,
    )


@pytest.fixture
def measure(inputs: Inputs, tmp_path: Path) -> Callable[..., tuple[dict, dict]]:
    """measure(method, sparsity) -> metrics and layer errors, on the tiny model."""
    parent = matrix.prepare_parent(inputs, tmp_path / "parent")
    return lambda method, sparsity, dense=10.0: matrix.measure_cell(inputs, method, sparsity, parent, dense)


@pytest.mark.parametrize(("sparsity", "share"), [("60", 0.6), ("2-4", 0.5)])
def test_every_method_gives_the_same_figures(measure, sparsity, share):
    for method in matrix.METHODS:
        metrics, layers = measure(method, sparsity)
        assert metrics.keys() == {
            "sparsity", "perplexity", "geometric_mean", "against_dense", "layer_error", "seconds",
        }  # fmt: skip
        assert metrics["sparsity"] == pytest.approx(share, abs=0.02)
        assert tuple(metrics["perplexity"]) == DOMAINS
        assert metrics["against_dense"] == pytest.approx(metrics["geometric_mean"] / 10, abs=1e-4)
        assert metrics["seconds"].keys() == {"statistics", "solve", "evaluate"}
        assert len(layers) == 7
        assert all(len(errors) == 2 and all(0 < error < 2 for error in errors) for errors in layers.values())


def test_dense_is_sparsity_0(measure, monkeypatch, capsys):
    metrics, layers = measure("dense", "0", None)
    assert (metrics["sparsity"], metrics["layer_error"], metrics["against_dense"], layers) == (0, 0, 1, {})
    monkeypatch.setattr("sys.argv", ["matrix.py", "cell", "dense", "50"])
    with pytest.raises(SystemExit):
        matrix.main()
    assert "dense is sparsity 0" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_statistics_of_the_newest_domain_alone_fit_that_domain_best(measure, method):
    newest, everything = (measure(f"{method}-{domains}", "50")[0]["layer_error"] for domains in ("newest", "all"))
    assert newest < everything


def test_a_chain_tells_what_is_forgotten_and_how_each_domain_met_the_model(inputs):
    metrics, layers = matrix.measure_chain(inputs, "copal", PruneConfig())
    perplexity = metrics["perplexity"]
    for name, times in metrics["forgetting"].items():
        assert times == pytest.approx(perplexity["medical"][name] / perplexity[name][name], rel=1e-3)
    assert metrics["backward_transfer"] == pytest.approx(
        -sum(map(math.log, metrics["forgetting"].values())) / 2, abs=1e-3
    )
    assert layers["code"]["before"] == layers["code"]["shift"] == {}
    for name in ("legal", "medical"):
        before, after = layers[name]["before"], layers[name]["after"]
        assert all(new < old for linear in after for new, old in zip(after[linear], before[linear], strict=True))
        assert len(layers[name]["shift"]) == 7


@pytest.mark.parametrize(("start", "zeros"), [("newest", [0.0, 0.0, 0.0]), ("again", [0.0, 0.5, 0.5])])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_a_method_without_a_state_begins_with_the_dense_base_or_with_what_the_last_domain_left(
    inputs, monkeypatch, method, start, zeros
):
    begins, step = [], matrix.prune_step

    def spy(base, parent, domain, out, **settings):
        weights = AutoModelForCausalLM.from_pretrained(base.folder).model.layers[0].mlp.up_proj.weight
        begins.append((parent, float((weights == 0).float().mean())))
        return step(base, parent, domain, out, **settings)

    monkeypatch.setattr(matrix, "prune_step", spy)
    metrics, _ = matrix.measure_chain(inputs, f"{method}-{start}", PruneConfig())
    assert begins == [(None, share) for share in zeros]
    forgotten = set(metrics["forgetting"].values())
    assert (forgotten == {1.0}) == (start == "again")  # at the same sparsity, what is pruned has nothing to give


def test_the_report_has_a_row_for_each_method_and_plots(measure, inputs, tmp_path):
    out = tmp_path / "bench"
    matrix.write(out, "dense-0", *measure("dense", "0", None))
    for method in matrix.METHODS:
        measured = measure(method, "50")
        for sparsity in matrix.SPARSITIES:
            matrix.write(out, f"{method}-{sparsity}", *measured)
    for method in ("wanda-newest", "wanda-again", "copal"):
        matrix.write(out, f"chain-{method}", *matrix.measure_chain(inputs, method, PruneConfig()))
    sparsities, domains = report.tables(out).split("\n\n")
    for table, columns in ((sparsities, 5), (domains, 4)):
        _, _, *rows = table.splitlines()
        assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == list(report.LABELS.values())
        assert {row.count("|") for row in rows} == {columns + 1}
    files = report.draw(out)
    assert {file.name for file in files} == {
        "steps.png", "perplexity-matrix.png", "forgetting.png", "layer-error.png", "new-domain.png",
    }  # fmt: skip
    assert all(file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 10_000 for file in files)
    again = {file: file.read_bytes() for file in files}
    assert {file: file.read_bytes() for file in report.draw(out)} == again


def test_the_table_of_ingredients_has_a_row_for_each_and_a_noise(inputs, monkeypatch):
    monkeypatch.setattr(ingredients, "device", lambda: inputs.device)
    windows = {name: (inputs.calibration[name], inputs.evaluation[name]) for name in DOMAINS}
    found = ingredients.measure(inputs.base, windows, inputs.dtype)
    assert list(found) == ["dense", *ingredients.INGREDIENTS]
    assert len(set(found.values())) == len(found)
    _, _, *rows = ingredients.table(
        {"these": [found, {name: 1.1 * value for name, value in found.items()}]}
    ).splitlines()
    assert len(rows) == len(found)
    assert all(" ± " in row for row in rows)
    assert rows[0].endswith("(1.000 ± 0.000) |")


def test_the_table_of_peers_has_what_each_costs_beside_how_good_it_is():
    perplexity = dict.fromkeys(DOMAINS, 10.0)
    other = {"method": "Wanda", "perplexity": dict.fromkeys(DOMAINS, 20.0), "seconds": 61.4, "peak": 1.26e9}
    _, _, *rows = peers.table([{"method": "dense", "perplexity": perplexity}, other]).splitlines()
    assert rows[0] == f"| dense |{' 10.00 |' * len(DOMAINS)} 10.00 (1.00) |  |  |"
    assert rows[1] == f"| Wanda |{' 20.00 |' * len(DOMAINS)} 20.00 (2.00) | 61 | 1.3 GB |"


def test_copal_beside_its_peers_takes_a_step_for_each_domain(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peers, "load_inputs", lambda folder: inputs)
    peers.step_by_step(tmp_path, tmp_path)
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["seconds"] > 0
    assert told["peak"] > 1e8
    assert all((tmp_path / name / "model").is_dir() for name in DOMAINS)


@pytest.mark.parametrize("name", ingredients.HELD_OUT)
def test_a_domain_that_is_held_out_has_documents_on_any_machine(name):
    documents = dict(ingredients.held_out_documents(name))
    assert sum(len(text) > 200 for text in documents.values()) > 50


def test_dvc_runs_every_method_at_every_sparsity():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert stages["bench"]["matrix"]["method"] == list(matrix.METHODS)
    assert [str(key) for key in stages["bench"]["matrix"]["sparsity"]] == list(matrix.SPARSITIES)
    assert stages["bench-chain"]["matrix"]["method"] == list(matrix.CHAINS)


def test_a_cost_past_its_limit_fails(capsys):
    fine, most, over = (cost.Ratio(name, seconds, 2.0, 1.5) for name, seconds in (("a", 1), ("b", 3), ("c", 3.1)))
    assert cost.judge([fine, most]) == 0
    assert "TOO MUCH" not in capsys.readouterr().out
    assert cost.judge([fine, over, most]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.endswith("TOO MUCH")] == ["c"]
    assert "1.55" in lines[2]


def test_what_a_step_costs_is_measured_and_nothing_is_left_behind(inputs: Inputs, tmp_path: Path):
    ratios = [
        cost.statistics(inputs, repeats=1),
        cost.statistics(inputs, repeats=1, criterion="output"),
        cost.solve(inputs, repeats=1, every=2),
        cost.tenth_step(inputs, repeats=1, domains=4),
        cost.tenth_evaluation(inputs, repeats=1),
    ]
    assert [(ratio.name, ratio.most) for ratio in ratios] == [
        ("statistics, loss", 3.5), ("statistics, output", 2), ("solve", 1.5), ("tenth step", 1.1),
        ("tenth evaluation", 1.1 * 3),
    ]  # fmt: skip
    assert all(ratio.cost > 0 and ratio.reference > 0 for ratio in ratios)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_the_chain_of_the_tenth_step_knows_every_domain_before_it(inputs: Inputs, monkeypatch):
    known = []
    step = cost.prune_step

    def spy(*arguments, **settings):
        report = step(*arguments, **settings)
        known.append(len(report.manifest.domains))
        return report

    monkeypatch.setattr(cost, "prune_step", spy)
    cost.tenth_step(inputs, repeats=2, domains=5)
    assert known == [1, 2, 3, 4, 2, 5, 2, 5]


def test_the_tenth_evaluation_scores_what_a_step_scores(inputs: Inputs, monkeypatch):
    """A version on all domains, and two models on the new one; see `tests/flows/step/test_dense.py`."""
    walks = []

    def spy(folder, windows, **settings):
        walks.append({name: len(tokens) for name, tokens in windows.items()})
        return {}

    monkeypatch.setattr(cost, "evaluate", spy)
    assert cost.tenth_evaluation(inputs, repeats=1, domains=4).most == 1.1 * 6 / 4
    of = {number: f"domain-{number}" for number in range(1, 5)}
    assert walks[3:] == [
        {of[1]: 2, of[2]: 2, of[3]: 2, of[4]: 2}, {of[4]: 2}, {of[4]: 2},
        {of[1]: 2, of[2]: 2}, {of[2]: 2}, {of[2]: 2},
    ]  # fmt: skip
