"""Two processes on one device: statistics, two steps and an evaluation, and what comes out if one does them alone.

Processes of a step have a GPU each, and NCCL carries what they tell one another. Two on one device it refuses; gloo
carries a GPU's tensors too, so that everything else is as it is on two.
"""

from __future__ import annotations

import os
import time

import torch

from gpu.checks import TOY
from gpu.part import Setting, Told
from support import in_processes
from support.llamas import write_llama
from support.windows import dialect


def run(setting: Setting, told: Told) -> None:
    """With two GPUs or more, also two processes with one each."""
    base, alone = setting.scratch / "base", setting.scratch / "alone"
    alone.mkdir()
    write_llama(base, TOY, spread=0.3)
    windows = {"code": dialect(0, windows=7), "legal": dialect(1, windows=8)}
    in_processes.run(base, windows, alone, setting.device)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    first = (visible or "0").split(",")[0] if setting.device.type == "cuda" else ""
    ways = {"two on one device, gloo": (("gloo",), {"CUDA_VISIBLE_DEVICES": first})}
    if torch.cuda.device_count() > 1:
        ways["two on two devices, NCCL"] = ((), {})
    for name, (backend, environment) in ways.items():
        began, out = time.perf_counter(), setting.scratch / f"{len(backend)}"
        out.mkdir()
        in_processes.launch(base, windows, out, *backend, environment=environment)
        seconds = f"{time.perf_counter() - began:.1f}"
        try:
            in_processes.same(alone, out)
            result = "as one process"
        except AssertionError as error:
            result = f"FAILED: {' '.join(str(error).split())[:300]}"
            told.fail(f"{name}: {result}")
        told.row("Processes", {"processes": name, "statistics, steps, perplexities": result, "seconds": seconds})
