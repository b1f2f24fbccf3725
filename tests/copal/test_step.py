from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from copal.checkpoint import Checkpoint
from copal.config import CalibrationConfig, PruneConfig
from copal.errors import StateError
from copal.evaluate import evaluate
from copal.state import StateReader
from copal.step import Base, NewDomain, Parent, StepReport, prune_step

CALIBRATION = CalibrationConfig(window_length=32, windows=8)
PRUNE = PruneConfig(iterations=30)


class Lineage:
    """A chain of versions on disk, without a registry."""

    def __init__(self, base: Path, folder: Path, prune: PruneConfig = PRUNE) -> None:
        self.base = Base(folder=base, fingerprint="base")
        self.folder, self.prune = folder, prune
        self.parent: Parent | None = None
        self.number = 1

    def add(self, name: str, windows: torch.Tensor, md5: str = "1", weight: float = 1.0) -> StepReport:
        self.number += 1
        out = self.folder / f"v{self.number}"
        domain = NewDomain(name=name, md5=md5, weight=weight, windows=windows)
        report = prune_step(
            self.base, self.parent, domain, out,
            calibration=CALIBRATION, prune=self.prune, device=torch.device("cpu"), dtype=torch.float32,
        )  # fmt: skip
        states = {**self.parent.states, self.parent.version: self.parent.state} if self.parent else {}
        self.parent = Parent(version=self.number, model=out / "model", state=out / "state", states=states)
        return report

    def weights(self) -> dict[str, torch.Tensor]:
        assert self.parent
        checkpoint = Checkpoint(self.parent.model)
        return {name: t for name, t in checkpoint.read(checkpoint.names()).items() if "layers" in name and t.ndim == 2}


def share_of_other_masks(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    different = sum(int(((one[name] == 0) != (other[name] == 0)).sum()) for name in one)
    return different / sum(weight.numel() for weight in one.values())


@pytest.fixture
def dialects(make_windows):
    return {name: make_windows(seed) for seed, name in enumerate(("code", "legal", "medical"))}


def test_all_six_orders_end_with_the_same_model_which_is_that_of_all_data_at_once(
    make_model, dialects, tmp_path, cpu
):
    base = make_model()
    ends = []
    for order in permutations(dialects):
        lineage = Lineage(base, tmp_path / "-".join(order))
        for name in order:
            lineage.add(name, dialects[name])
        ends.append(lineage)
    at_once = Lineage(base, tmp_path / "at-once")
    at_once.add("all", torch.cat(list(dialects.values())))
    expected = evaluate(at_once.parent.model, dialects, device=cpu, dtype=torch.float32)
    for lineage in ends:
        assert share_of_other_masks(lineage.weights(), at_once.weights()) <= 1e-4
        found = evaluate(lineage.parent.model, dialects, device=cpu, dtype=torch.float32)
        for name in dialects:
            assert found[name].perplexity == pytest.approx(expected[name].perplexity, rel=1e-3)
