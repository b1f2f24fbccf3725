"""What a step costs, as ratios on this machine: python tests/bench/cost.py

- statistics: collecting and storing a domain's statistics / a plain forward of the dense model over the same windows;
  with the criterion `loss`, which goes back through the model as well, and with `output`.
- solve: `prune_group` / SparseGPT on the same matrices and statistics, of every third block.
- tenth step: the step of the 10th domain / that of the 2nd, on few windows with a short solve, so that reading,
  merging and writing the state weigh most; evaluation left out.
- tenth evaluation: that of the step of the 10th domain / that of the 2nd: it grows, and by no more than its windows do.

The two sides of a ratio take turns, so that whatever else the machine does hits both; each side's best time counts.
Exits with 1 where a ratio is past its limit.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from inputs import FOLDER, Inputs, fetch_inputs, load_inputs
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from copal.allocation import RowZeros
from copal.baselines import sparsegpt
from copal.config import PruneConfig
from copal.evaluation import evaluate
from copal.progress import Progress, silent
from copal.recorder import MomentRecorder
from copal.sensitivity import Moment
from copal.solve import Pruned, PruneGroup, prune_group
from copal.step import NewDomain, Parent, StepReport, prune_step
from copal.streaming import StreamedModel
from flows.terminal.progress import progress_bar

BATCH = 8
_MOST = {"loss": 3.5, "output": 2.0}  # times a plain forward
QUICK = PruneConfig(rounds=(1.0,), iterations=1)


@dataclass(frozen=True, slots=True)
class Ratio:
    """A measured cost over the cost of what it is compared with, in seconds, and the most that it may be."""

    name: str
    cost: float
    reference: float
    most: float

    @property
    def value(self) -> float:
        return self.cost / self.reference


def judge(ratios: list[Ratio]) -> int:
    """Print each ratio beside its limit; 1 if one is past it, else 0."""
    print(f"{'':<20}{'seconds':>10}{'against':>10}{'ratio':>8}{'at most':>9}")
    for ratio in ratios:
        verdict = "ok" if ratio.value <= ratio.most else "TOO MUCH"
        figures = f"{ratio.cost:>10.2f}{ratio.reference:>10.2f}{ratio.value:>8.2f}{ratio.most:>9.2f}"
        print(f"{ratio.name:<20}{figures}  {verdict}")
    return int(any(ratio.value > ratio.most for ratio in ratios))


def statistics(inputs: Inputs, repeats: int, criterion: str = "loss", progress: Progress = silent) -> Ratio:
    """StepReport's seconds of the statistics, reading blocks and writing the state among them / `model(**batch)`."""
    windows, prune = next(iter(inputs.calibration.values())), PruneConfig(criterion=criterion)
    dense = AutoModelForCausalLM.from_pretrained(inputs.base.folder, dtype=inputs.dtype).to(inputs.device).eval()

    def forward(part: Tensor) -> float:
        with torch.no_grad(), _timed(inputs) as seconds:
            for tokens in torch.split(part.to(inputs.device), BATCH):
                dense(**{"input_ids": tokens, "use_cache": False})
        return seconds[0]

    def collect(part: Tensor) -> float:
        with tempfile.TemporaryDirectory(dir=inputs.base.folder.parent) as scratch:
            domain = NewDomain(name="timed", md5="-", weight=1.0, windows=part)
            return _step(inputs, None, domain, Path(scratch) / "out", prune, _keep).seconds["statistics"]

    costs, references = [], []
    for number in range(repeats + 1):
        part = windows if number else windows[:BATCH]  # the first, short one only warms up
        references.append(forward(part))
        costs.append(collect(part))
        progress("statistics", number + 1, repeats + 1)
    return Ratio(f"statistics, {criterion}", min(costs[1:]), min(references[1:]), _MOST[criterion])


def solve(inputs: Inputs, repeats: int, every: int = 3, progress: Progress = silent) -> Ratio:
    """`prune_group` / SparseGPT, on every group of linears of every `every`-th block, with the default settings."""
    groups = list(_groups(inputs, every))
    sides: tuple[PruneGroup, PruneGroup] = (partial(prune_group, products=inputs.dtype), sparsegpt)
    for side in sides:  # warms up
        side(*groups[0], PruneConfig())
    totals = [0.0, 0.0]
    for number, group in enumerate(groups):
        seconds: tuple[list[float], list[float]] = ([], [])
        for _ in range(repeats):
            for side, times in zip(sides, seconds, strict=True):
                with _timed(inputs) as taken:
                    side(*group, PruneConfig())
                times.append(taken[0])
        totals = [total + min(times) for total, times in zip(totals, seconds, strict=True)]
        progress("solve", number + 1, len(groups))
    return Ratio("solve", *totals, 1.5)


def tenth_step(inputs: Inputs, repeats: int, domains: int = 10, each: int = 2, progress: Progress = silent) -> Ratio:
    """The last of `domains` steps / the second, each on `each` windows of its own, evaluation left out.

    A chain of steps that prune nothing comes first: it leaves the states of the first and the last but one domain, and
    warms up. From these two the second and the last step are then taken in turn, `repeats` times.
    """
    windows = torch.split(torch.cat(list(inputs.calibration.values())), each)[:domains]
    seconds: tuple[list[float], list[float]] = ([], [])
    with tempfile.TemporaryDirectory(dir=inputs.base.folder.parent) as scratch:

        def step(number: int, parent: Parent | None, out: Path, method: PruneGroup | None) -> None:
            domain = NewDomain(name=f"domain-{number}", md5="-", weight=1.0, windows=windows[number - 1])
            _step(inputs, parent, domain, out, QUICK, method)

        folders = [Path(scratch) / f"{number}" for number in range(domains + 1)]
        parents: list[Parent | None] = [None]
        for number in range(1, domains):
            step(number, parents[-1], folders[number], _keep)
            parents.append(Parent.from_step(folders[number], number, parents[-1]))
            if number > 2:
                shutil.rmtree(folders[number - 1])
            progress("tenth step", number, domains - 1 + repeats)
        for turn in range(repeats):
            for number, times in zip((2, domains), seconds, strict=True):
                out = Path(scratch) / "again"
                with _timed(inputs) as taken:
                    step(number, parents[number - 1], out, None)
                times.append(taken[0])
                shutil.rmtree(out)
            progress("tenth step", domains + turn, domains - 1 + repeats)
    second, last = map(min, seconds)
    return Ratio("tenth step", last, second, 1.1)


def tenth_evaluation(
    inputs: Inputs, repeats: int, domains: int = 10, each: int = 2, progress: Progress = silent
) -> Ratio:
    """Evaluation in the last of `domains` steps / in the second, on `each` windows of a domain.

    A step scores its version on every domain, and the parent and the dense base on the new one: windows of 12 domains
    against those of 4, and of three models the weights are read on either side. So the ratio is at most 3, and a tenth
    more is for what else the machine does.
    """
    parts = torch.split(torch.cat(list(inputs.evaluation.values())), each)[:domains]
    windows = {f"domain-{number}": part for number, part in enumerate(parts, start=1)}

    def evaluation(number: int) -> float:
        """As in step `number`; the dense base in the place of all three models, for zeros cost as much."""
        known = dict(list(windows.items())[:number])
        new = {f"domain-{number}": known[f"domain-{number}"]}
        with _timed(inputs) as seconds:
            for scored in (known, new, new):
                evaluate(inputs.base.folder, scored, device=inputs.device, dtype=inputs.dtype, batch=BATCH)
        return seconds[0]

    evaluation(1)  # warms up
    costs, references = [], []
    for turn in range(repeats):
        costs.append(evaluation(domains))
        references.append(evaluation(2))
        progress("tenth evaluation", turn + 1, repeats)
    return Ratio("tenth evaluation", min(costs), min(references), 1.1 * (domains + 2) / (2 + 2))


def _groups(inputs: Inputs, every: int) -> Iterator[tuple[dict[str, Tensor], Moment]]:
    """Dense weights and statistics of each group of linears of blocks 0, `every`, 2 `every`, ..."""
    model = StreamedModel(inputs.base.folder, device=inputs.device, dtype=inputs.dtype)
    stream = model.start(next(iter(inputs.calibration.values())), BATCH)
    for index, name in enumerate(model.architecture.blocks):
        with model.block(index) as block:
            if index % every:
                stream.advance(block)
                continue
            with MomentRecorder(block, gradient=False) as recorder:
                stream.advance(block)
        weights, moments = model.weights(index), recorder.moments(1.0, name)
        for group, linears in recorder.groups().items():
            yield {linear: weights[linear] for linear in linears}, moments[group]


def _keep(weights: Mapping[str, Tensor], moment: Moment, config: PruneConfig, zeros: RowZeros | None = None) -> Pruned:
    """Prunes nothing: what is left of a step is its statistics."""
    return Pruned(weights)


def _step(
    inputs: Inputs, parent: Parent | None, domain: NewDomain, out: Path, prune: PruneConfig, method: PruneGroup | None
) -> StepReport:
    return prune_step(
        inputs.base, parent, domain, out, calibration=inputs.settings, prune=prune,
        device=inputs.device, dtype=inputs.dtype, batch=BATCH, method=method,
    )  # fmt: skip


@contextmanager
def _timed(inputs: Inputs) -> Iterator[list[float]]:
    """A list that holds, after the `with`, the seconds that it took."""
    wait: Callable[[], None] = torch.cuda.synchronize if inputs.device.type == "cuda" else lambda: None
    seconds: list[float] = []
    wait()
    began = time.perf_counter()
    yield seconds
    wait()
    seconds.append(time.perf_counter() - began)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=Path, default=FOLDER, help="base, windows and scratch (default: %(default)s)")
    asked = parser.parse_args()
    disable_progress_bar()  # of transformers: it would run through ours
    with progress_bar() as progress:
        if not (asked.inputs / "windows.safetensors").is_file():
            fetch_inputs(asked.inputs, None, None, progress)
        inputs = load_inputs(asked.inputs)
        ratios = [
            statistics(inputs, repeats=2, criterion="loss", progress=progress),
            statistics(inputs, repeats=2, criterion="output", progress=progress),
            solve(inputs, repeats=2, progress=progress),
            tenth_step(inputs, repeats=2, progress=progress),
            tenth_evaluation(inputs, repeats=2, progress=progress),
        ]
    windows, length = next(iter(inputs.calibration.values())).shape
    print(f"{windows} windows of {length} tokens, {inputs.dtype}, {inputs.device}, {torch.get_num_threads()} threads")
    return judge(ratios)


if __name__ == "__main__":
    sys.exit(main())
