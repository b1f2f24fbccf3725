"""Peak memory of two steps and an evaluation: python larger_than_memory.py FOLDER MEGABYTES

Writes a synthetic checkpoint of that size into FOLDER, prunes it twice (the second step has a parent) and evaluates
what comes out. Prints JSON: the checkpoint's size, resident memory of the bare process and its peak in bytes; seconds.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from transformers.models.llama import modeling_llama  # noqa: F401  (part of the bare process)

from copal.baselines import wanda
from copal.config import CalibrationConfig, PruneConfig
from copal.evaluation import evaluate
from copal.solve import prune_group
from copal.step import Base, NewDomain, Parent, prune_step
from support.llamas import Llama, write_llama
from support.memory import memory

CPU = torch.device("cpu")


def sized(size: int) -> Llama:
    """A Llama of at least `size` bytes in float32."""
    one = Llama(hidden=512, inner=1024, blocks=1, heads=8, key_value_heads=2, vocabulary=256)
    block = 4 * sum(torch.Size(shape).numel() for shape in one.block.values())
    return replace(one, blocks=-(-size // block))


def main(folder: Path, size: int) -> None:
    llama = sized(size)
    size = write_llama(folder / "base", llama)
    bare, began = memory("VmRSS"), time.perf_counter()
    parent = None
    generator = torch.Generator().manual_seed(1)
    for version, name in enumerate(("code", "legal"), start=2):
        windows = torch.randint(llama.vocabulary, (4, 32), generator=generator)
        prune_step(
            Base(folder=folder / "base", fingerprint="base"),
            parent,
            NewDomain(name=name, md5="1", weight=1.0, windows=windows),
            folder / name,
            calibration=CalibrationConfig(),
            prune=PruneConfig(criterion="loss", rounds=(1.0,), iterations=1),
            device=CPU,
            dtype=torch.float32,
            method=prune_group if parent else wanda,  # the first version only has to be there
            resume=folder / "unfinished",
        )
        parent = Parent.from_step(folder / name, version, parent)
    evaluate(parent.model, {"legal": windows}, device=CPU, dtype=torch.float32)
    print(json.dumps({"size": size, "bare": bare, "peak": memory("VmHWM"), "seconds": time.perf_counter() - began}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) * 10**6)
