"""Copal beside llm-compressor's SparseGPT and Wanda, in one run: make peers

The same model, calibration windows and domains; half of the weights. Each method prunes domain by domain (each time on
what the last domain left), and llm-compressor's also all domains at once, which a step of copal's does in any case.
Perplexity is copal's own for all of them. Each method has a process for itself, with the same threads; seconds are of
the processor, all threads together, so that a busy machine tells no lies.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from inputs import FOLDER, fetch_inputs, load_inputs

from copal.config import PruneConfig
from copal.evaluation import evaluate, geometric_mean
from copal.files import write_atomic
from copal.step import Parent, prune_step
from flows.lineage.figures import gigabytes, markdown_table
from flows.start.domains import DOMAINS
from flows.terminal.progress import progress_bar

HERE = Path(__file__).parent
PEER, OUT = Path(".bench") / "peers", Path("bench") / "peers.md"
METHODS = ("SparseGPT", "Wanda")


def step_by_step(inputs: Path, out: Path) -> None:
    """Copal's steps for the domains in turn, in this process; prints JSON as peer.py does."""
    found = load_inputs(inputs)
    parent, seconds = None, 0.0
    for version, name in enumerate(found.calibration, start=2):
        began = time.process_time()
        prune_step(
            found.base, parent, found.domain(name), out / name, calibration=found.settings, prune=PruneConfig(),
            device=found.device, dtype=found.dtype,
        )  # fmt: skip
        seconds += time.process_time() - began
        parent = Parent.from_step(out / name, version, parent)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"seconds": seconds, "peak": peak}))


def told(command: Sequence[object]) -> dict[str, float]:
    """The JSON that a process prints last."""
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown; each row: method, perplexity ({domain: value}), and seconds and peak, but for the dense base."""
    dense = geometric_mean(list(rows[0]["perplexity"].values()))
    cells = []
    for row in rows:
        mean = geometric_mean(list(row["perplexity"].values()))
        costs = [f"{row['seconds']:.0f}", gigabytes(row["peak"])] if "seconds" in row else ["", ""]
        figures = [f"{row['perplexity'][domain]:.2f}" for domain in DOMAINS]
        cells.append([row["method"], *figures, f"{mean:.2f} ({mean / dense:.2f})", *costs])
    heads = ("half of the weights", *DOMAINS, "geometric mean (times dense)", "processor seconds", "peak memory")
    return markdown_table(heads, cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=Path, default=FOLDER, help="base, windows and scratch (default: %(default)s)")
    parser.add_argument("--peer", type=Path, default=PEER, help="venv with llm-compressor (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="where the table goes (default: %(default)s)")
    parser.add_argument("--own", type=Path, help=argparse.SUPPRESS)  # copal's part, in a process for itself
    asked = parser.parse_args()
    if asked.own:
        return step_by_step(asked.inputs, asked.own)
    with progress_bar() as progress:
        if not (asked.inputs / "windows.safetensors").exists():
            fetch_inputs(asked.inputs, None, None, progress)
        inputs = load_inputs(asked.inputs)

        def scored(method: str, model: Path, **costs: float) -> dict[str, Any]:
            scores = evaluate(model, inputs.evaluation, device=inputs.device, dtype=inputs.dtype, progress=progress)
            return {"method": method, "perplexity": {name: one.perplexity for name, one in scores.items()}, **costs}

        rows = [scored("dense", inputs.base.folder)]
        with tempfile.TemporaryDirectory(dir=asked.inputs) as scratch:
            peer = (asked.peer / "bin" / "python", HERE / "peer.py")
            windows = asked.inputs / "windows.safetensors"
            for method in METHODS:
                model, seconds, peak = inputs.base.folder, 0.0, 0.0
                for domain in DOMAINS:
                    out = Path(scratch) / f"{method}-{domain}"
                    found = told([*peer, method, model, windows, out, domain])
                    model, seconds, peak = out, seconds + found["seconds"], max(peak, found["peak"])
                rows.append(scored(f"{method}, domain by domain", model, seconds=seconds, peak=peak))
                out = Path(scratch) / f"{method}-all"
                found = told([*peer, method, inputs.base.folder, windows, out, *DOMAINS])
                rows.append(scored(f"{method}, all domains at once", out, **found))
            own = Path(scratch) / "copal"
            own.mkdir()
            found = told([sys.executable, __file__, "--inputs", asked.inputs, "--own", own])
            rows.append(scored("copal, domain by domain", own / DOMAINS[-1] / "model", **found))
    write_atomic(asked.out, table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
