"""A chain of versions on disk, without a registry."""

from __future__ import annotations

from pathlib import Path

import torch

from copal.checkpoint import Checkpoint
from copal.config import CalibrationConfig, PruneConfig
from copal.state import Manifest, StateReader
from copal.step import Base, NewDomain, Parent, StepReport, WithdrawnDomain, prune_step

CALIBRATION = CalibrationConfig(window_length=32, windows=8)
COMPACT = CalibrationConfig(window_length=32, windows=8, storage="compact")
PRUNE = PruneConfig(iterations=30)


class Lineage:
    def __init__(self, base: Path, folder: Path, prune: PruneConfig = PRUNE, device: str = "cpu") -> None:
        self.base = Base(folder=base, fingerprint="base")
        self.folder, self.prune, self.calibration = folder, prune, CALIBRATION
        self.device = torch.device(device)
        self.parent: Parent | None = None
        self.number = 1

    def add(self, name: str, windows: torch.Tensor, md5: str = "1", weight: float = 1.0) -> StepReport:
        return self.step(NewDomain(name=name, md5=md5, weight=weight, windows=windows))

    def withdraw(self, name: str) -> StepReport:
        return self.step(WithdrawnDomain(name=name))

    def step(self, domain: NewDomain | WithdrawnDomain) -> StepReport:
        self.number += 1
        out = self.folder / f"v{self.number}"
        report = prune_step(
            self.base, self.parent, domain, out,
            calibration=self.calibration, prune=self.prune, device=self.device, dtype=torch.float32,
        )  # fmt: skip
        self.parent = Parent.from_step(out, self.number, self.parent)
        return report

    @property
    def model(self) -> Path:
        assert self.parent
        return self.parent.model

    @property
    def manifest(self) -> Manifest:
        assert self.parent
        return StateReader(self.parent.state).manifest

    def weights(self) -> dict[str, torch.Tensor]:
        assert self.parent
        checkpoint = Checkpoint(self.parent.model)
        return {name: t for name, t in checkpoint.read(checkpoint.names()).items() if "layers" in name and t.ndim == 2}


def share_of_other_masks(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    different = sum(int(((one[name] == 0) != (other[name] == 0)).sum()) for name in one)
    return different / sum(weight.numel() for weight in one.values())
