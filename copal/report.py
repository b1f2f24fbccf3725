"""What a step tells of itself: how each linear was before it and is after it.

Shapes: O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from copal.bounded import read_typed
from copal.errors import StateError
from copal.files import write_json
from copal.masks import zeros
from copal.sensitivity import output_energy
from copal.state import Manifest, StateReader

__all__ = ["LayerReport", "StepReport", "compare", "read_report", "write_report"]

_FILE = "report.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerReport:
    """What the step did to one linear.

    Where a domain goes, its data is not at hand: both errors are then over all domains that stay.

    Attributes:
        name: dotted name in the model.
        features: of its input.
        tokens: tokens of the new domain that it read; of an expert, those that are routed to it. 0 where a domain goes.
        weights: how many the linear has.
        zeros: how many of them are zero now.
        weights_back: how many are zero in the parent and not zero now.
        error_before: tr((W - W') G (W - W')^T) / tr(W G W^T) on the new domain with the parent's weights W'; None where
            the parent is dense.
        error_after: the same with the new weights.
        response_shift: tr(W G_new W^T) / tr(W G_old W^T), how much more the dense linear answers to the new domain than
            to those before it; None for the first domain, and where a domain goes.
        damping: what the solve added to the diagonal of G (`copal.solve.Damped`); None where it solved nothing.
    """

    name: str
    features: int
    tokens: int
    weights: int
    zeros: int
    weights_back: int
    error_before: float | None
    error_after: float
    response_shift: float | None
    damping: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """What a step made.

    Attributes:
        layers: every pruned linear, in the order in which they run.
        manifest: of the state that was written.
        seconds: what `statistics` (forward passes included) and `solve` took.
    """

    layers: tuple[LayerReport, ...]
    manifest: Manifest
    seconds: Mapping[str, float]

    @property
    def sparsity(self) -> float:
        """Share of zeros among the weights of the pruned linears, as counted in the stored dtype."""
        return sum(layer.zeros for layer in self.layers) / sum(layer.weights for layer in self.layers)

    @property
    def weights_back(self) -> int:
        """How many weights are zero in the parent and not zero here."""
        return sum(layer.weights_back for layer in self.layers)

    @property
    def short(self) -> tuple[str, ...]:
        """Linears of experts that too few tokens of the new domain are routed to: fewer than they have input features.

        They are pruned for the tokens of the whole layer instead: `copal.recorder.OTHERS_SHARE`.
        """
        most = max(layer.tokens for layer in self.layers)
        return tuple(layer.name for layer in self.layers if layer.tokens < min(layer.features, most))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Told:
    """What is stored of a report beside the manifest."""

    layers: tuple[LayerReport, ...]
    seconds: Mapping[str, float]


def compare(
    name: str, *, dense: Tensor, was: Tensor | None, now: Tensor, new: Tensor, old: Tensor | None,
    tokens: int, damping: float | None,
) -> LayerReport:  # fmt: skip
    """Compare a linear's weights (O, I) in the base, in the parent and now.

    Args:
        was: the parent's; None where the parent is dense.
        new: G (I, I) of the new domain, or over all domains that stay.
        old: G (I, I) over the domains before it, for the response shift.
        tokens, damping: go into the report as they are.
    """
    energy = output_energy(dense, new)
    old_energy = output_energy(dense, old) if old is not None else 0.0

    def error(weight: Tensor) -> float:
        return output_energy(dense - weight, new) / energy if energy > 0 else 0.0

    return LayerReport(
        name=name,
        features=dense.shape[1],
        tokens=tokens,
        weights=dense.numel(),
        zeros=zeros(now),
        weights_back=int(((was == 0) & (now != 0)).sum()) if was is not None else 0,
        error_before=error(was) if was is not None else None,
        error_after=error(now),
        response_shift=energy / old_energy if old_energy > 0 else None,
        damping=damping,
    )


def write_report(folder: Path, report: StepReport) -> None:
    """Write what the manifest in `folder`/state does not tell."""
    told = {"layers": [asdict(layer) for layer in report.layers], "seconds": report.seconds}
    write_json(folder / _FILE, told)


def read_report(out: Path) -> StepReport:
    """The report of the step that wrote the folder `out`.

    Raises:
        StateError: `out` is not what a step wrote, or is damaged.
    """
    manifest = StateReader(out / "state").manifest
    told = read_typed(_Told, out / _FILE, StateError)
    return StepReport(layers=told.layers, manifest=manifest, seconds=told.seconds)
