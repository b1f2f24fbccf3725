"""Perplexity of every method at every sparsity on the demo domains. `dvc repro` runs what dvc.yaml says of it.

python tests/bench/matrix.py prepare                 base, windows, and a version that knows all domains but the newest
python tests/bench/matrix.py cell METHOD SPARSITY    the newest domain's step -> metrics/, layers/
python tests/bench/matrix.py chain METHOD            a step for each domain, half pruned -> metrics/, layers/

report.py makes tables and plots of it.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from inputs import FOLDER, Inputs, fetch_inputs, load_inputs

from copal.baselines import magnitude, sparsegpt, wanda
from copal.config import PruneConfig
from copal.evaluation import backward_transfer, evaluate, geometric_mean
from copal.files import write_json
from copal.progress import Progress, silent
from copal.solve import PruneGroup
from copal.step import Base, LayerReport, Parent, StepReport, prune_step
from flows.start.domains import DOMAINS
from flows.terminal.progress import progress_bar

OUT = Path("bench")
METHODS: dict[str, tuple[PruneGroup | None, bool]] = {  # whether statistics are of every domain, or of the newest
    "magnitude": (magnitude, False),
    "wanda-newest": (wanda, False),
    "wanda-all": (wanda, True),
    "sparsegpt-newest": (sparsegpt, False),
    "sparsegpt-all": (sparsegpt, True),
    "copal": (None, True),
}
CHAINS = (
    *("wanda-newest", "wanda-again", "sparsegpt-newest", "sparsegpt-again", "sparsegpt-all"),
    *("copal", "copal-compact"),
)
AGAIN = "-again"  # in place of -newest: what the last domain left is pruned, and not the dense base
COMPACT = "-compact"  # after a method's name: its contributions are stored so
SPARSITIES: dict[str, float | str] = {"50": 0.5, "60": 0.6, "70": 0.7, "2-4": "2:4"}  # keys: as file names spell them


def prepare_parent(inputs: Inputs, out: Path, progress: Progress = silent) -> Parent:
    """Write a version to `out` that knows every domain but the newest.

    It is pruned by magnitude, the quickest way: statistics come from the dense base, so any method leaves this state.
    """
    earlier, parent = list(inputs.calibration)[:-1], None
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        for version, name in enumerate(earlier, start=2):
            target = out if name == earlier[-1] else Path(scratch) / name
            _step(inputs, name, parent, target, "magnitude", PruneConfig(), progress)
            parent = Parent.from_step(target, version, parent)
    assert parent
    return parent


def measure_cell(
    inputs: Inputs, method: str, sparsity: str, parent: Parent, dense: float | None, progress: Progress = silent
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The newest domain's step by `method`, or none for `dense`, and perplexity on every domain after it.

    Args:
        sparsity: a key of `SPARSITIES`; of `dense` it is 0.
        parent: see `prepare_parent`; only the methods for all domains build on it.
        dense: geometric mean of the dense base's perplexities; None for `dense` itself.

    Returns:
        Metrics; and linear -> layer error on the newest domain by block.
    """
    layers: tuple[LayerReport, ...] = ()
    model, seconds, zeros = inputs.base.folder, dict[str, float](), 0.0
    with tempfile.TemporaryDirectory(dir=inputs.base.folder.parent) as scratch:
        if method != "dense":
            out, newest = Path(scratch) / "out", list(inputs.calibration)[-1]
            prune, of_all = PruneConfig(sparsity=SPARSITIES[sparsity]), METHODS[method][1]
            if not of_all:
                prune = _without_gradient(prune)
            report = _step(inputs, newest, parent if of_all else None, out, method, prune, progress)
            model, seconds, zeros, layers = out / "model", dict(report.seconds), report.sparsity, report.layers
        perplexity, seconds["evaluate"] = _evaluate(inputs, model, progress)
    mean = geometric_mean(list(perplexity.values()))
    metrics = {
        "sparsity": round(zeros, 6),
        "perplexity": perplexity,
        "geometric_mean": round(mean, 4),
        "against_dense": round(mean / dense, 4) if dense else 1.0,
        "layer_error": _short(sum(layer.error_after for layer in layers) / max(len(layers), 1)),
        "seconds": {part: round(value, 1) for part, value in seconds.items()},
    }
    return metrics, _by_linear(layers, lambda layer: layer.error_after)


def measure_chain(
    inputs: Inputs, method: str, prune: PruneConfig, progress: Progress = silent
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A step for each domain in turn by `method`, with perplexity on every domain after each.

    A method that knows the newest domain only has no state. It prunes the dense base for each domain, or `AGAIN` what
    the last domain left.

    Returns:
        Metrics: `perplexity`, newest domain -> domain -> its figure, those that are yet to come among them;
        `forgetting`, earlier domain -> perplexity at the end / when it was the newest; `backward_transfer`. And newest
        domain -> `before`, `after` (layer errors on it with the parent's weights and with the new ones) and `shift`
        (response shift) -> linear -> value by block.
    """
    names, base, parent = list(inputs.calibration), inputs.base, None
    of_all = _of(method)[1]
    if not of_all:
        prune = _without_gradient(prune)
    perplexity: dict[str, dict[str, float]] = {}
    layers: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=inputs.base.folder.parent) as scratch:
        for version, name in enumerate(names, start=2):
            out = Path(scratch) / name
            report = _step(replace(inputs, base=base), name, parent, out, method, prune, progress)
            perplexity[name], _ = _evaluate(inputs, out / "model", progress)
            layers[name] = {
                "before": _by_linear(report.layers, lambda layer: layer.error_before),
                "after": _by_linear(report.layers, lambda layer: layer.error_after),
                "shift": _by_linear(report.layers, lambda layer: layer.response_shift),
            }
            if of_all:
                parent = Parent.from_step(out, version, parent)
            elif method.endswith(AGAIN):
                base = Base(folder=out / "model", fingerprint=name)
    when_newest = {name: perplexity[name][name] for name in names[:-1]}
    now = {name: perplexity[names[-1]][name] for name in when_newest}
    transfer = backward_transfer(when_newest, now)
    assert transfer is not None
    metrics = {
        "perplexity": perplexity,
        "forgetting": {name: round(now[name] / when_newest[name], 4) for name in now},
        "backward_transfer": round(transfer, 4),
    }
    return metrics, layers


def write(out: Path, name: str, metrics: dict[str, Any], layers: dict[str, Any]) -> None:
    """Write `out`/metrics/`name`.json, for people to read, and `out`/layers/`name`.json, for plots."""
    for part in ("metrics", "layers"):
        (out / part).mkdir(parents=True, exist_ok=True)
    write_json(out / "metrics" / f"{name}.json", metrics)
    if layers:  # dense has none
        (out / "layers" / f"{name}.json").write_text(json.dumps(layers) + "\n")


def _of(method: str) -> tuple[PruneGroup | None, bool]:
    """The entry of `METHODS` behind one of `CHAINS`."""
    return METHODS[method.removesuffix(COMPACT).replace(AGAIN, "-newest")]


def _without_gradient(prune: PruneConfig) -> PruneConfig:
    """No method but copal looks at the gradient, which takes most of the time."""
    return replace(prune, criterion="output")


def _step(
    inputs: Inputs, name: str, parent: Parent | None, out: Path, method: str, prune: PruneConfig, progress: Progress
) -> StepReport:
    storage = "compact" if method.endswith(COMPACT) else "full"
    return prune_step(
        inputs.base, parent, inputs.domain(name), out, calibration=replace(inputs.settings, storage=storage),
        prune=prune, device=inputs.device, dtype=inputs.dtype, method=_of(method)[0],
        progress=progress,
    )  # fmt: skip


def _evaluate(inputs: Inputs, model: Path, progress: Progress) -> tuple[dict[str, float], float]:
    """Domain -> perplexity of `model`; and the seconds that took."""
    began = time.perf_counter()
    scores = evaluate(model, inputs.evaluation, device=inputs.device, dtype=inputs.dtype, progress=progress)
    return {name: round(score.perplexity, 4) for name, score in scores.items()}, time.perf_counter() - began


def _by_linear(layers: Iterable[LayerReport], value: Callable[[LayerReport], float | None]) -> dict[str, list[float]]:
    """Name of a linear within its block -> `value` by block, where there is one."""
    found: dict[str, list[float]] = {}
    for layer in layers:
        within, number = re.match(r".*?\.\d+\.(.+)", layer.name), value(layer)
        if within and number is not None:
            found.setdefault(within[1], []).append(_short(number))
    return found


def _short(number: float) -> float:
    """To 4 significant digits."""
    return float(f"{number:.4g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=Path, default=FOLDER, help="base, windows and scratch (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="metrics and layers (default: %(default)s)")
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare")
    prepare.add_argument("--data", type=Path, help=f"folder of {', '.join(DOMAINS)} (default: they are built)")
    prepare.add_argument("--windows", type=int, help="of a domain, for a quick try in another --inputs (default: all)")
    cell = commands.add_parser("cell")
    cell.add_argument("method", choices=["dense", *METHODS])
    cell.add_argument("sparsity", choices=["0", *SPARSITIES])
    commands.add_parser("chain").add_argument("method", choices=CHAINS)
    asked = parser.parse_args()
    parent = asked.inputs / "parent"
    with progress_bar() as progress:
        if asked.command == "prepare":
            shutil.rmtree(parent, ignore_errors=True)
            fetch_inputs(asked.inputs, asked.data, asked.windows, progress)
            prepare_parent(load_inputs(asked.inputs), parent, progress)
        elif asked.command == "chain":
            made = measure_chain(load_inputs(asked.inputs), asked.method, PruneConfig(), progress)
            write(asked.out, f"chain-{asked.method}", *made)
        else:
            if (asked.method == "dense") != (asked.sparsity == "0"):
                parser.error("dense is sparsity 0, and no other method is")
            file = asked.out / "metrics" / "dense-0.json"
            dense = None if asked.method == "dense" else json.loads(file.read_text())["geometric_mean"]
            inputs, known = load_inputs(asked.inputs), Parent.from_step(parent, len(DOMAINS), None)
            write(
                asked.out,
                f"{asked.method}-{asked.sparsity}",
                *measure_cell(inputs, asked.method, asked.sparsity, known, dense, progress),
            )


if __name__ == "__main__":
    main()
