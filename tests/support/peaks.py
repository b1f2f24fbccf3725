"""Steps on toys, and the peak memory of the last one of each: python peaks.py < CASES

CASES: a JSON list of objects; each has the config of a model, the dtype in which it is `stored`, the dtype of the
forward pass, the settings `calibration` and `prune`, `batch` and `steps`. Prints a JSON list: the peak of the last step
of each, less what the process held before it, in bytes.

Run it with MALLOC_MMAP_THRESHOLD_=65536: the matrices of a toy are then given back as those of a large model are, in
place of lying in a heap that only grows.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from copal.config import CalibrationConfig, PruneConfig
from copal.step import Base, NewDomain, Parent, StepReport, prune_step
from support.larger_than_memory import CPU
from support.memory import memory


def steps(case: dict[str, Any], folder: Path) -> Iterator[Callable[[], StepReport]]:
    """The steps of a case, each to be taken before the next is asked for; step 2 is the first, to `folder`/2."""
    config = AutoConfig.for_model(**case["config"])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, case["stored"]))
    model.save_pretrained(folder / "base")
    del model
    settings, parent = CalibrationConfig(**case["calibration"]), None
    for number in range(2, 2 + case["steps"]):
        windows = torch.randint(config.vocab_size, (settings.windows, settings.window_length))
        yield partial(
            prune_step, Base(folder=folder / "base", fingerprint="base"), parent,
            NewDomain(name=f"domain-{number}", md5="1", windows=windows), folder / str(number),
            calibration=settings, prune=PruneConfig(**case["prune"]), device=CPU,
            dtype=getattr(torch, case["dtype"]), batch=case["batch"],
        )  # fmt: skip
        parent = Parent.from_step(folder / str(number), number, parent)


def peak(case: dict[str, Any]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        for step in steps(case, Path(folder)):
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
            before = memory("VmRSS")
            step()
            found = memory("VmHWM") - before
    return found


if __name__ == "__main__":
    disable_progress_bar()
    print(json.dumps([peak(case) for case in json.load(sys.stdin)]))
