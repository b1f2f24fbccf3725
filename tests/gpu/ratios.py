"""The ratios of `make bench` (tests/bench/cost.py), on a random model of the same shape, since no model can be fetched.

Their limits are for a CPU. On a GPU the products are so fast that what a step reads, writes and hashes weighs most.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import cost
from inputs import Inputs

from copal.base import Base
from gpu.part import Setting, Told
from support.llamas import write_llama


def run(setting: Setting, told: Told) -> None:
    """Each ratio, best of two; a single try of the tenth step, which takes longest."""
    sizes, base = setting.sizes, setting.scratch / "base"
    write_llama(base, sizes.bench, dtype=setting.dtype, device=setting.device)
    inputs = Inputs(
        base=Base(folder=base, fingerprint="random"),
        calibration={name: setting.windows(seed, sizes.bench.vocabulary) for seed, name in enumerate("abc")},
        evaluation={name: setting.windows(seed, sizes.bench.vocabulary) for seed, name in enumerate("abc", start=3)},
        device=setting.device,
        dtype=setting.dtype,
    )
    measurements: tuple[Callable[[], cost.Ratio], ...] = (
        partial(cost.statistics, inputs, repeats=2, criterion="output"),
        partial(cost.statistics, inputs, repeats=2, criterion="loss"),
        partial(cost.solve, inputs, repeats=2),
        partial(cost.tenth_step, inputs, repeats=1, domains=sizes.chain),
        partial(cost.tenth_evaluation, inputs, repeats=2, domains=sizes.chain),
    )
    for measure in measurements:
        ratio = measure()
        told.row(
            "Ratios",
            {
                "": ratio.name,
                "seconds": f"{ratio.cost:.2f}",
                "against": f"{ratio.reference:.2f}",
                "ratio": f"{ratio.value:.2f}",
                "at most, on a CPU": f"{ratio.most:.2f}",
            },
        )
    told.note(
        f"Llama of {sizes.bench.blocks} blocks, hidden size {sizes.bench.hidden}, {sizes.windows} windows of "
        f"{sizes.length} tokens, {setting.dtype}; of the chain, step {sizes.chain} against step 2."
    )
