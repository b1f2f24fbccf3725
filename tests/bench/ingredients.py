"""What each ingredient of a step is worth: python tests/bench/ingredients.py [--seeds 3]

Half of the weights are pruned for three domains at once, with one thing changed at a time: on the domains of the demo,
with which copal's choices were made, and on three that no choice has seen. Perplexities are geometric means over the
three; in brackets how many times the dense base's that is, and how far windows of other seeds move that (standard
deviation): a seed draws calibration and evaluation windows, so that a figure compares with those of its own seeds.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from pydoc_data import topics

import torch
from inputs import FOLDER, SOURCE
from torch import Tensor

from copal.base import Base, open_base
from copal.baselines import sparsegpt
from copal.calibration import domain_windows
from copal.config import CalibrationConfig, PruneConfig
from copal.evaluation import evaluate, geometric_mean
from copal.processes import device
from copal.progress import Progress, silent
from copal.solve import PruneGroup
from copal.step import NewDomain, Parent, WithdrawnDomain, prune_step
from copal.streaming import compute_dtype
from flows.models.base import fetch_base
from flows.start.domains import DOMAINS, build_domain
from flows.terminal.progress import progress_bar

HELD_OUT = ("headers", "readmes", "manual")
DEFAULT = PruneConfig()
INGREDIENTS: dict[str, tuple[PruneConfig, PruneGroup | None]] = {
    "SparseGPT on every domain": (DEFAULT, sparsegpt),
    "copal": (DEFAULT, None),
    "all rows alike (criterion output)": (replace(DEFAULT, spread=0.0), None),
    "rows within 0.15 of the sparsity": (replace(DEFAULT, spread=0.15), None),
    "Wanda's exponent": (replace(DEFAULT, exponent=0.5), None),
    "one round": (replace(DEFAULT, rounds=(1.0,)), None),
}


def held_out_documents(name: str) -> Iterator[tuple[str, str]]:
    """(id, text) of a domain of `HELD_OUT`, from what is installed.

    `headers`: C++ headers that torch brings. `readmes`: descriptions of the installed packages. `manual`: the language
    reference that Python's `help()` shows.
    """
    if name == "headers":
        folder = Path(torch.__file__).parent / "include"
        for path in sorted(folder.rglob("*.h"))[:3000]:
            yield path.relative_to(folder).as_posix(), path.read_text(encoding="utf-8", errors="replace")
    elif name == "readmes":
        for distribution in importlib.metadata.distributions():
            _, _, description = (distribution.read_text("METADATA") or "").partition("\n\n")
            yield distribution.name.lower(), description
    else:
        yield from topics.topics.items()


def fetch_windows(base: Base, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Domain -> calibration (N, L) and evaluation (N, L) windows, of the demo's domains and of those held out."""
    found, tokenizer = {}, base.tokenizer()
    with tempfile.TemporaryDirectory() as scratch:
        for name in (*DOMAINS, *HELD_OUT):
            folder = Path(scratch) / name
            if name in DOMAINS:
                build_domain(name, folder)
            else:
                folder.mkdir()
                documents = dict(sorted(held_out_documents(name)))
                lines = [json.dumps({"id": key, "text": text}) for key, text in documents.items() if len(text) >= 200]
                (folder / "documents.jsonl").write_text("\n".join(lines) + "\n")
            windows = domain_windows(folder, tokenizer, CalibrationConfig(seed=seed))
            found[name] = windows.calibration, windows.evaluation
    return found


def measure(
    base: Base, windows: Mapping[str, tuple[Tensor, Tensor]], dtype: torch.dtype, progress: Progress = silent
) -> dict[str, float]:
    """Ingredient, or `dense` -> geometric mean over the domains of `windows`.

    Statistics are taken once: each row of the table then takes out a domain that counts next to nothing, for which no
    window runs through the model.
    """
    calibration = CalibrationConfig()
    together = torch.cat([part for part, _ in windows.values()])
    domains = [
        NewDomain(name="all", md5="-", windows=together),
        NewDomain(name="none", md5="-", weight=1e-6, windows=together[:1]),
    ]

    def mean(model: Path) -> float:
        scores = evaluate(model, {name: part for name, (_, part) in windows.items()}, device=device(), dtype=dtype)
        return geometric_mean([score.perplexity for score in scores.values()])

    found = {"dense": mean(base.folder)}
    with tempfile.TemporaryDirectory(dir=base.folder.parent) as scratch:
        parent = None
        for version, domain in enumerate(domains, start=2):
            out = Path(scratch) / f"{version}"
            prune_step(
                base, parent, domain, out, calibration=calibration,
                prune=replace(DEFAULT, rounds=(1.0,), iterations=1), device=device(), dtype=dtype,
            )  # fmt: skip
            parent = Parent.from_step(out, version, parent)
        for number, (name, (prune, method)) in enumerate(INGREDIENTS.items(), start=1):
            with tempfile.TemporaryDirectory(dir=scratch) as row:
                prune_step(
                    base, parent, WithdrawnDomain(name="none"), Path(row) / "v", calibration=calibration, prune=prune,
                    device=device(), dtype=dtype, method=method,
                )  # fmt: skip
                found[name] = mean(Path(row) / "v" / "model")
            progress("ingredients", number, len(INGREDIENTS))
    return found


def table(runs: Mapping[str, list[dict[str, float]]]) -> str:
    """Markdown; `runs`: which domains -> what `measure` found, a seed each."""
    lines = [f"| half of the weights | {' | '.join(runs)} |", "|---|" + "---|" * len(runs)]
    for name in ("dense", *INGREDIENTS):
        cells = []
        for found in runs.values():
            values, times = [run[name] for run in found], [run[name] / run["dense"] for run in found]
            noise = f" ± {statistics.stdev(times):.3f}" if len(times) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f} ({statistics.mean(times):.3f}{noise})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=Path, default=FOLDER, help="base and scratch (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="of the calibration windows (default: %(default)s)")
    asked = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = {"domains of the demo": [], "domains held out": []}
    with progress_bar() as progress:
        if not (asked.inputs / "base").exists():
            fetch_base(SOURCE, asked.inputs / "base", progress)
        base, dtype = open_base(asked.inputs / "base"), compute_dtype("auto", device())
        for seed in range(asked.seeds):
            windows = fetch_windows(base, seed)
            for found, names in zip(runs.values(), (DOMAINS, HELD_OUT), strict=True):
                found.append(measure(base, {name: windows[name] for name in names}, dtype, progress))
            print(f"{seed + 1} of {asked.seeds} seeds\n\n{table(runs)}\n", flush=True)  # it is an hour's work


if __name__ == "__main__":
    main()
