"""How fast hardware is: named GPUs by their data sheets, and this machine by a short product.

Of what a data sheet promises, half is counted: large products and long vectors reach more, and what is in between
reaches less. Copal has not been timed on these cards.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["NAMED", "Hardware", "this_machine"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """What one device does in a second.

    Attributes:
        half: operations of matrix products in the dtype of the forward pass, accumulated in float32.
        single: operations of matrix products in float32.
        moved: bytes read from its memory and written to it.
        memory: bytes that it has; None: it is not told.
    """

    half: float
    single: float
    moved: float
    memory: int | None = None


def _half_of(half: float, single: float, moved: float, gigabytes: int) -> Hardware:
    """From nominal Tera-operations (without sparsity) and Terabytes a second."""
    return Hardware(half=0.5e12 * half, single=0.5e12 * single, moved=0.5e12 * moved, memory=gigabytes * 10**9)


# NVIDIA's data sheets: bfloat16 on tensor cores, float32 without them (TF32 is off in torch), memory.
NAMED = {
    "A100-80GB": _half_of(312, 19.5, 2.04, 80),  # SXM
    "H100-80GB": _half_of(989, 67, 3.35, 80),  # SXM
    "H200": _half_of(989, 67, 4.8, 141),
    "L40S": _half_of(362, 91.6, 0.864, 48),
}


def this_machine(device: torch.device, dtype: torch.dtype, size: int = 1024) -> Hardware:
    """What `device` does now, by a second or less of work: whatever else it does slows it.

    Args:
        size: of the matrices that are multiplied; on a CPU at most 2048.
    """
    on_gpu = device.type == "cuda"
    size = min(size, 8192 if on_gpu else 2048)

    def product(dtype: torch.dtype) -> float:
        matrix = torch.ones(size, size, device=device, dtype=dtype)
        return 2 * size**3 / _best(device, lambda: matrix @ matrix)

    vector = torch.ones(2**28 if on_gpu else 2**24, device=device)
    single = product(torch.float32)
    return Hardware(
        half=single if dtype == torch.float32 else 0.5 * product(dtype),  # in a step they reach half of it, measured
        single=single,
        moved=2 * vector.nbytes / _best(device, lambda: vector.mul_(1.0)),
        memory=torch.cuda.get_device_properties(device).total_memory if on_gpu else None,
    )


def _best(device: torch.device, work: Callable[[], object], times: int = 3) -> float:
    """Seconds of the fastest of some runs, after one that warms up."""
    seconds = []
    for _ in range(times + 1):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])
