"""One part of the report, or several, in a process of their own: `run.py` starts it.

What a part finds is on the disk row by row: where it is stopped or fails, all rows before that are told.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from copal.files import write_atomic
from copal.streaming import compute_dtype
from support.architectures import ARCHITECTURES
from support.llamas import Llama

__all__ = ["FULL", "TINY", "Setting", "Sizes", "Told", "wait"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """How large everything is.

    Attributes:
        step: the model of the large step.
        few: how many of its blocks are enough for a first look.
        bench: the model of the ratios.
        windows, length: calibration windows of a domain, and tokens of one.
        chain: which step of a chain is compared with the second.
        tokens: rows of the products with 2:4 weights.
        architectures: that are tried.
    """

    step: Llama
    few: int
    bench: Llama
    windows: int
    length: int
    chain: int
    tokens: tuple[int, ...]
    architectures: tuple[str, ...]


FULL = Sizes(
    step=Llama(hidden=4096, inner=11008, blocks=32, heads=32, key_value_heads=32, vocabulary=32000),  # Llama-2-7B
    few=4,
    bench=Llama(hidden=576, inner=1536, blocks=30, heads=9, key_value_heads=3, vocabulary=49152),  # SmolLM2-135M
    windows=24,
    length=512,
    chain=10,
    tokens=(1, 16, 256, 2048, 8192),
    architectures=tuple(ARCHITECTURES),
)
TINY = Sizes(
    step=Llama(hidden=64, inner=128, blocks=2, heads=4, key_value_heads=4, vocabulary=128),
    few=1,
    bench=Llama(hidden=32, inner=64, blocks=2, heads=4, key_value_heads=2, vocabulary=128),
    windows=8,
    length=32,
    chain=3,
    tokens=(1, 16),
    architectures=("llama", "mixtral"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """Where a part computes, with what, and for how long.

    Attributes:
        scratch: a folder that goes when the part ends.
        until: by `time.time`, which is the same in the process that watches over this one.
    """

    device: torch.device
    dtype: torch.dtype
    sizes: Sizes
    scratch: Path
    until: float

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return max(0.0, self.until - time.time())

    def windows(self, seed: int, vocabulary: int) -> torch.Tensor:
        """Random calibration windows (N, L)."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(vocabulary, (self.sizes.windows, self.sizes.length), generator=generator)


class Told:
    """What a part has found so far."""

    def __init__(self, file: Path, machine: dict[str, str]) -> None:
        self._file = file
        self._tables: dict[str, list[dict[str, str]]] = {}
        self._notes: list[str] = []
        self._failed: list[str] = []
        self._machine = machine
        self._began = time.perf_counter()
        self._write(finished=False)

    def row(self, table: str, cells: dict[str, str]) -> None:
        """Add a row, column -> text, to the table of this title."""
        self._tables.setdefault(table, []).append(cells)
        self._write(finished=False)

    def note(self, text: str) -> None:
        """Say something below the tables."""
        self._notes.append(text)
        self._write(finished=False)

    def fail(self, text: str) -> None:
        """Something is not as it must be; the part goes on."""
        self._failed.append(text)
        self._write(finished=False)

    def finish(self) -> None:
        """Everything is told."""
        self._write(finished=True)

    def _write(self, *, finished: bool) -> None:
        told = {
            "machine": self._machine, "tables": self._tables, "notes": self._notes, "failed": self._failed,
            "finished": finished, "seconds": time.perf_counter() - self._began,
        }  # fmt: skip
        write_atomic(self._file, json.dumps(told))


def wait(device: torch.device) -> None:
    """Until the device has done what it was told to: it works on while Python goes on."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _machine(device: torch.device) -> dict[str, str]:
    if device.type != "cuda":
        return {"card": "none: the CPU", "threads": str(torch.get_num_threads())}
    card = torch.cuda.get_device_properties(device)
    return {
        "card": card.name,
        "memory": f"{card.total_memory / 2**30:.0f} GiB",
        "compute capability": f"{card.major}.{card.minor}",
        "CUDA": str(torch.version.cuda),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--shape", choices=("full", "tiny"), required=True)
    parser.add_argument("--told", type=Path, required=True, help="folder for what is found")
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--until", type=float, required=True, help="seconds since the epoch")
    asked = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and asked.shape == "full":
        print("no CUDA device is here; --shape tiny tries the script on the CPU", file=sys.stderr)
        return 2
    for name in asked.names:
        told = Told(asked.told / f"{name}.json", _machine(device))
        with TemporaryDirectory(dir=asked.scratch, prefix=f"{name}-") as scratch:
            setting = Setting(
                device=device,
                dtype=compute_dtype("auto", device),
                sizes=FULL if asked.shape == "full" else TINY,
                scratch=Path(scratch),
                until=asked.until,
            )
            import_module(f"gpu.{name}").run(setting, told)
        told.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
