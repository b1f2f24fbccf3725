"""Baselines on the domains of a workspace: python tests/bench/baselines.py WORKSPACE

On the calibration and evaluation windows of the newest version: perplexity of the dense base, of magnitude pruning, of
Wanda and SparseGPT with the newest domain's calibration windows alone and with every domain's statistics, and of the
newest version.
Prints a markdown table.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from accelerate import PartialState
from transformers import AutoTokenizer

from copal.baselines import magnitude, sparsegpt, wanda
from copal.calibration import domain_windows
from copal.evaluate import evaluate, geometric_mean
from copal.step import Base, NewDomain, Parent, prune_step
from copal.streaming import compute_dtype
from flows.datasets import dataset_version, fetch
from flows.registry import open_registry
from flows.settings import load_settings, open_workspace
from flows.terminal import progress_bar


def main(folder: Path) -> None:
    workspace = open_workspace(folder)
    settings = load_settings(workspace.params)
    registry = open_registry(workspace, settings)
    head = registry.head()
    record = registry.record(head)
    newest = record["step"]["name"]
    base = Base(folder=registry.folder(registry.root()) / "model", fingerprint=record["base"]["fingerprint"])
    tokenizer = AutoTokenizer.from_pretrained(base.folder)
    windows = {}
    for domain in record["domains"]:
        version = dataset_version(workspace.root, domain["name"], domain["git_rev"])
        windows[domain["name"]] = domain_windows(
            fetch(workspace.root, version, workspace.cache), tokenizer, settings.calibration
        )
    device = PartialState().device
    dtype = compute_dtype(settings.model.dtype, device)
    earlier = registry.folder(registry.version(head.parent))
    states = {version.number: registry.folder(version) / "state" for version in registry.versions()}
    before = Parent(version=head.parent, model=earlier / "model", state=earlier / "state", states=states)
    rows = {"dense": record["dense_perplexity"]}
    for name, method, parent in (
        ("magnitude", magnitude, None),
        (f"Wanda, {newest} alone", wanda, None),
        ("Wanda, every domain", wanda, before),
        (f"SparseGPT, {newest} alone", sparsegpt, None),
        ("SparseGPT, every domain", sparsegpt, before),
    ):
        domain = NewDomain(name=newest, md5="-", weight=1.0, windows=windows[newest].calibration)
        with tempfile.TemporaryDirectory() as scratch, progress_bar() as progress:
            out = Path(scratch) / "out"
            prune_step(
                base, parent, domain, out, calibration=settings.calibration, prune=settings.prune,
                device=device, dtype=dtype, method=method, progress=progress,
            )  # fmt: skip
            texts = {name: found.evaluation for name, found in windows.items()}
            scores = evaluate(out / "model", texts, device=device, dtype=dtype, progress=progress)
        rows[name] = {domain: score.perplexity for domain, score in scores.items()}
    rows[f"copal, version {head.number}"] = record["perplexity"]
    dense = geometric_mean(list(rows["dense"].values()))
    print(f"| | {' | '.join(windows)} | geometric mean | against dense |")
    print(f"|---|{'---|' * (len(windows) + 2)}")
    for name, perplexity in rows.items():
        mean = geometric_mean(list(perplexity.values()))
        figures = " | ".join(f"{perplexity[domain]:.2f}" for domain in windows)
        print(f"| {name} | {figures} | {mean:.2f} | {mean / dense:.2f} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
