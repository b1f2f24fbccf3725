"""What several tests of the flows do with a workspace of a toy model: steps without Prefect, weights, masks, claims."""

from __future__ import annotations

from typing import Any

import torch

from copal.checkpoint import Checkpoint
from flows.registry.registry import Registry
from flows.step.run import Made, plain_tasks, run_step


def step(bench: Any, domain: str = "code") -> Made | None:
    """One step, at the watched branch."""
    return run_step(bench.project, domain, None, plain_tasks())


def weights(bench: Any, number: int) -> dict[str, torch.Tensor]:
    """The pruned linears of a version, as stored."""
    checkpoint = Checkpoint(bench.registry.folder(bench.registry.version(number)) / "model")
    return {name: t for name, t in checkpoint.read(checkpoint.names()).items() if "layers" in name and t.ndim == 2}


def other_masks(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The share of weights that are zero in one of the two and not in the other."""
    different = sum(int(((one[name] == 0) != (other[name] == 0)).sum()) for name in one)
    return different / sum(weight.numel() for weight in one.values())


def last_claim(registry: Registry) -> dict[str, str]:
    """The newest entry of who works on the lineage."""
    claims = registry.entries("claim")
    return claims[max(claims)]


def expire_claim(registry: Registry) -> None:
    """As if the holder of the lineage had been paused past its expiry."""
    registry.change_entry("claim", max(registry.entries("claim")), {"expires": "0"})
