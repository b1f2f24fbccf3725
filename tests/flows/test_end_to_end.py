"""The main job on the real 135M-parameter model, through the command line, on small windows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from copal.baselines import wanda
from copal.calibration import domain_windows
from copal.evaluation import evaluate, geometric_mean
from copal.step import Base, NewDomain, prune_step
from copal.streaming import compute_dtype
from flows.cli import main
from flows.data.dvc import add_and_commit
from flows.models.base import BaseModel
from flows.params import load_settings
from flows.start.domains import build_domain

pytestmark = [pytest.mark.real_model, pytest.mark.usefixtures("prefect")]

PARAMS = """
model: {name: real}
calibration: {window_length: 128, windows: 8, evaluation_windows: 8}
prune: {iterations: 3}
"""


@pytest.fixture(scope="module")
def lineage(real_base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which `copal watch --once` ran after each of two commits."""
    root = tmp_path_factory.mktemp("end-to-end") / "workspace"
    root.mkdir()
    (root / "params.yaml").write_text(PARAMS)
    assert main(["init", str(root), "--base", str(real_base.folder)]) == 0
    for domain in ("code", "legal"):
        build_domain(domain, root / "data" / domain)
        add_and_commit(root, domain, f"Add {domain}")
        assert main(["watch", "--once", "--workspace", str(root)]) == 0
    return root


def told(lineage: Path, capsys: pytest.CaptureFixture[str]) -> dict:
    capsys.readouterr()
    assert main(["status", "--json", "--workspace", str(lineage)]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_lineage_holds_a_half_sparse_version_a_domain(lineage, capsys):
    status = told(lineage, capsys)
    root, first, second = status["versions"]
    assert (root["parent"], first["parent"], second["parent"]) == (None, 1, 2)
    assert (first["domain"], second["domain"]) == ("code", "legal")
    assert first["perplexity"].keys() == {"code"}
    assert second["perplexity"].keys() == {"code", "legal"}
    assert [version["sparsity"] for version in (first, second)] == [pytest.approx(0.5, abs=1e-4)] * 2
    assert second["weights_back"] > 100_000
    assert second["aliases"] == ["challenger", "latest"]  # it passed its gates
    assert status["pending"] == []


def test_both_domains_are_kept_which_wanda_on_the_newest_does_not(lineage, real_base, tmp_path, capsys, cpu):
    settings = load_settings(lineage / "params.yaml")
    tokenizer = AutoTokenizer.from_pretrained(real_base.folder)
    windows = {
        name: domain_windows(lineage / "data" / name, tokenizer, settings.calibration) for name in ("code", "legal")
    }
    dtype = compute_dtype("auto", cpu)
    newest = NewDomain(name="legal", md5="-", weight=1.0, windows=windows["legal"].calibration)
    prune_step(
        Base(folder=real_base.folder, fingerprint=real_base.fingerprint), None, newest, tmp_path / "wanda",
        calibration=settings.calibration, prune=settings.prune, device=cpu, dtype=dtype, method=wanda,
    )  # fmt: skip
    evaluation = {name: found.evaluation for name, found in windows.items()}
    scores = evaluate(tmp_path / "wanda" / "model", evaluation, device=cpu, dtype=dtype)
    baseline = geometric_mean([score.perplexity for score in scores.values()])
    newest_version = told(lineage, capsys)["versions"][-1]
    ours = geometric_mean(list(newest_version["perplexity"].values()))
    dense = geometric_mean(list(newest_version["dense_perplexity"].values()))
    assert ours <= 0.85 * baseline
    assert ours <= 2 * dense


def test_nothing_new_makes_nothing_and_says_so(lineage, capsys):
    capsys.readouterr()
    assert main(["watch", "--once", "--workspace", str(lineage)]) == 0
    assert "nothing new" in capsys.readouterr().out
    assert len(told(lineage, capsys)["versions"]) == 3


def test_an_exported_version_loads_anywhere_and_speaks(lineage, tmp_path):
    assert main(["export", "latest", str(tmp_path / "model"), "--workspace", str(lineage)]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    weights = torch.cat([weight.flatten() for name, weight in model.model.layers.named_parameters() if "_proj" in name])
    assert (weights == 0).float().mean().item() == pytest.approx(0.5, abs=1e-3)
    prompt = tokenizer("Permission is hereby granted, free of", return_tensors="pt")
    with torch.no_grad():
        said = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert len(set(said[0, -8:].tolist())) > 2
