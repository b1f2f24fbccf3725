"""Sensitivity statistics: what a domain's inputs say about every linear, and how the statistics of domains add up.

A small change moves the output of a linear by dy = W dx + dW x. Pruning makes dW; its mean square on domain i is
tr(dW G_i dW^T) with the second moment (uncentred; Gram matrix over tokens) G_i = E_i[x x^T]. So G_i is all that a later
step needs to know of domain i, and over domains G = sum_i w_i G_i / sum_i w_i. After COPAL (Malla, Choi, Choi 2024,
arXiv 2405.02347); these formulas are ours.

Shapes: I in features, O out features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Moment", "inverse_mean_square", "merge", "output_energy", "scores", "squares"]


@dataclass(frozen=True, slots=True)
class Moment:
    """Second moments over one or more domains, of one group of linears that read the same input.

    Kept as sums and not as means: each addition rounds once, so that the order of the domains hardly shows.

    Attributes:
        total: (I, I) float32, sum_i w_i E_i[x x^T].
        weight: sum_i w_i.
        gradient_total: linear -> (O, I) float32, sum_i w_i E_i[(y_k x_l)^2] with y = W x; empty unless the criterion
            `gradient` is used.
    """

    total: Tensor
    weight: float
    gradient_total: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def second(self) -> Tensor:
        """G (I, I): the weighted mean of the domains' second moments."""
        return self.total / self.weight

    @property
    def gradient(self) -> dict[str, Tensor]:
        """Linear -> (O, I): the weighted mean of the domains' E_i[(y_k x_l)^2]."""
        return {name: total / self.weight for name, total in self.gradient_total.items()}


def merge(one: Moment, other: Moment) -> Moment:
    """The moments over the domains of both. Commutative and, up to rounding, associative (ours)."""
    assert one.gradient_total.keys() == other.gradient_total.keys()
    gradient = {name: one.gradient_total[name] + other.gradient_total[name] for name in one.gradient_total}
    return Moment(one.total + other.total, one.weight + other.weight, gradient)


def scores(weight: Tensor, second: Tensor, exponent: float, gradient: Tensor | None = None) -> Tensor:
    """Score (O, I) of each weight; the higher, the more the output suffers without it.

    Without `gradient` the criterion `output`: |W_kl| G_ll^exponent. With an exponent of 1/2 that is the root mean
    square by which y_k moves if W_kl goes (Wanda's score, Sun et al. 2023, over all domains); a lower one tempers
    massive channels (as in RIA, Zhang et al. 2024, which takes 1/4). With it the criterion `gradient`:
    |W_kl| E[(y_k x_l)^2]^exponent; with 1/2, the weight times the root mean square of the gradient of |y|^2 / 2 (ours).
    """
    squares = second.diagonal().clamp_min(0) if gradient is None else gradient
    return weight.abs() * squares.pow(exponent)


def squares(values: Tensor) -> Tensor:
    """x^2 (T, C) float32 of `values` (..., C)."""
    # Squared where they were copied to: on a CPU a second new tensor of that size costs more than all the arithmetic.
    return values.reshape(-1, values.shape[-1]).to(torch.float32, copy=True).square_()


def inverse_mean_square(hidden: Tensor) -> Tensor:
    """rho (T, 1) of hidden states (..., H): one over the mean square of each; 0 where that is 0."""
    size = squares(hidden).mean(1, keepdim=True)
    return torch.where(size > 0, size.reciprocal(), 0.0)


def output_energy(weight: Tensor, second: Tensor) -> float:
    """tr(W G W^T): the mean square of the output of `weight` (O, I) over the tokens of `second` (I, I)."""
    return ((weight @ second) * weight).sum().item()
