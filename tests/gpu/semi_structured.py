"""2:4 weights as a step exports them, in torch's semi-structured kernels: the product's error and speed.

The dense product has the same weights, zeros and all, in the same dtype. Each kernel is timed twice: as Python calls it
in a loop, where the wrapper of a semi-structured tensor costs tens of microseconds a call, and on the device alone,
where calls wait in line behind a pause. Weights take turns, so that no product finds them in the cache.

Shapes: T tokens, O out features, I in features.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.sparse import (
    SparseSemiStructuredTensor,
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
    to_sparse_semi_structured,
)

from copal.base import Base
from copal.config import CalibrationConfig, Pattern, PruneConfig
from copal.masks import follows
from copal.step import NewDomain, prune_step
from copal.streaming import StreamedModel
from gpu.part import Setting, Told, wait
from support.llamas import write_llama

LINEARS = ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")
_COPIES, _CALLS, _ROUNDS = 4, 20, 5
_PAUSE = 50_000_000  # cycles: some 25 ms, in which Python puts all calls into the line


def run(setting: Setting, told: Told) -> None:
    """The linears of one block."""
    usable = setting.device.type == "cuda" and torch.cuda.get_device_capability(setting.device) >= (8, 0)
    if not usable:
        told.note("Left out: semi-structured kernels, which need a CUDA device of compute capability 8.0 or newer.")
    for name, weight in _exported(setting).items():
        assert follows(weight, Pattern(2, 4)), f"{name} is not 2:4"
        kernels = {"dense": [weight.clone() for _ in range(_COPIES)]}
        if usable:
            kernels |= _sparse(name, weight, told)
        for tokens in setting.sizes.tokens:
            _compare(setting, told, f"{name.split('.')[-1]} {tuple(weight.shape)}", kernels, tokens)


def _exported(setting: Setting) -> dict[str, Tensor]:
    """Linear -> its weight (O, I) in a model that a step with the pattern 2:4 has written, as kernels take it."""
    base, out = setting.scratch / "base", setting.scratch / "v"
    llama = replace(setting.sizes.step, blocks=1)
    write_llama(base, llama, dtype=setting.dtype, device=setting.device)
    prune_step(
        Base(folder=base, fingerprint="random"),
        None,
        NewDomain(name="a", md5="-", windows=setting.windows(0, llama.vocabulary)),
        out,
        calibration=CalibrationConfig(window_length=setting.sizes.length, windows=setting.sizes.windows),
        prune=PruneConfig(sparsity="2:4"),
        device=setting.device,
        dtype=setting.dtype,
    )
    weights = StreamedModel(out / "model", device=setting.device, dtype=setting.dtype).weights(0)
    return {name: weights[name].to(setting.dtype).contiguous() for name in LINEARS}


def _sparse(name: str, weight: Tensor, told: Told) -> dict[str, list[Tensor]]:
    """Kernel -> copies of `weight` as it takes them. The first is the one that torch takes by itself."""
    kernels: dict[str, list[Tensor]] = {}
    ways: tuple[Callable[[Tensor], SparseSemiStructuredTensor], ...] = (
        to_sparse_semi_structured,
        SparseSemiStructuredTensorCUSPARSELT.from_dense,
        SparseSemiStructuredTensorCUTLASS.from_dense,
    )
    for way in ways:
        try:
            sparse = [way(weight) for _ in range(_COPIES)]
            kernels.setdefault(sparse[0].BACKEND, sparse)
        except (RuntimeError, NotImplementedError) as error:
            told.note(f"{name}: {way.__qualname__} does not take it: {' '.join(str(error).split())[:200]}")
    return kernels


@torch.inference_mode()
def _compare(setting: Setting, told: Told, name: str, kernels: dict[str, list[Tensor]], tokens: int) -> None:
    """A row for each kernel: x (T, I) times W^T."""
    dense = kernels["dense"][0]
    generator = torch.Generator(setting.device).manual_seed(0)
    x = torch.randn(tokens, dense.shape[1], generator=generator, device=setting.device, dtype=setting.dtype)
    exact = F.linear(x.float(), dense.float())
    reference: tuple[float, float] | None = None
    for kernel, copies in kernels.items():
        cells = {"linear": name, "tokens": str(tokens), "kernel": kernel}
        try:
            error = float((F.linear(x, copies[0]).float() - exact).norm() / exact.norm())
            called, alone = _in_a_loop(setting, x, copies), _alone(setting, x, copies)
        except (RuntimeError, NotImplementedError) as problem:
            told.row("Products", cells | {"relative error": f"could not: {' '.join(str(problem).split())[:200]}"})
            continue
        if error > 0.02:
            told.fail(f"{name}, {tokens} tokens: {kernel} is off by {error:.3g}")
        reference = reference or (called, alone)
        times = {
            "relative error": f"{error:.1e}",
            "in a loop, µs": f"{called * 1e6:.1f}",
            "dense / this, in a loop": f"{reference[0] / called:.2f}",
        }
        if setting.device.type == "cuda":
            times |= {
                "device alone, µs": f"{alone * 1e6:.1f}",
                "dense / this, device alone": f"{reference[1] / alone:.2f}",
            }
        told.row("Products", cells | times)


def _in_a_loop(setting: Setting, x: Tensor, copies: list[Tensor]) -> float:
    """Seconds of one product, called in a loop: the median."""
    seconds = []
    for number in range(_ROUNDS + 1):  # the first warms up
        wait(setting.device)
        began = time.perf_counter()
        _products(x, copies)
        wait(setting.device)
        seconds += [(time.perf_counter() - began) / _CALLS] if number else []
    return statistics.median(seconds)


def _alone(setting: Setting, x: Tensor, copies: list[Tensor]) -> float:
    """Seconds of one product on the device, without Python's share: the median; 0 on a CPU."""
    seconds = [0.0]
    if setting.device.type == "cuda":
        seconds = []
        for _ in range(_ROUNDS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(_PAUSE)
            start.record()
            _products(x, copies)
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1000 / _CALLS)
    return statistics.median(seconds)


def _products(x: Tensor, copies: list[Tensor]) -> None:
    for weight in itertools.islice(itertools.cycle(copies), _CALLS):
        F.linear(x, weight)
