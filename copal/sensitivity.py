"""Sensitivity statistics: what a domain's inputs say about every linear, and how the statistics of domains add up.

A small change moves the output of a linear by dy = W dx + dW x. Pruning makes dW; its mean square on domain i is
tr(dW G_i dW^T) with the second moment (uncentred; Gram matrix over tokens) G_i = E_i[x x^T]. So G_i is all that a later
step needs to know of domain i, and over domains G = sum_i w_i G_i / sum_i w_i. After COPAL (Malla, Choi, Choi 2024,
arXiv 2405.02347); these formulas are ours.

Shapes: T tokens, I in features, O out features, J = I / 2 rounded up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from copal.architecture import as_rows, find_linears
from copal.errors import NumericsError

__all__ = [
    "Moment",
    "MomentRecorder",
    "fold",
    "merge",
    "output_energy",
    "pack",
    "record_moments",
    "scores",
    "unfold",
    "unpack",
]


@dataclass(frozen=True, slots=True)
class Moment:
    """Second moments over one or more domains, of one group of linears that read the same input.

    Kept as sums: plain additions round once each, so that the order of the domains hardly shows.

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


class MomentRecorder:
    """Sums x x^T over the tokens that reach the linears of one block, while the block runs.

    Linears that are handed the very same tensor share one sum: that is how query/key/value or gate/up are found.
    """

    def __init__(self, block: nn.Module, *, gradient: bool) -> None:
        self._linears = find_linears(block)
        self._gradient = gradient
        self._group_of: dict[str, str] = {}
        self._sums: dict[str, Tensor] = {}
        self._gradient_sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._inputs: list[tuple[Tensor, str]] = []  # of the forward that is under way: keeps them alive

    def groups(self) -> dict[str, list[str]]:
        """Group (named after its first linear) -> its linears, in the order in which they ran."""
        groups: dict[str, list[str]] = {}
        for linear, group in self._group_of.items():
            groups.setdefault(group, []).append(linear)
        return groups

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Group -> (O, I), O of all its linears together."""
        weights = {name: as_rows(linear, linear.get_parameter("weight")) for name, linear in self._linears.items()}
        return {
            group: (sum(len(weights[linear]) for linear in linears), weights[group].shape[1])
            for group, linears in self.groups().items()
        }

    def moments(self, weight: float, where: str) -> dict[str, Moment]:
        """The moments of all tokens so far, by group.

        Args:
            weight: the domain's weight w_i.
            where: the block's name, for the error.

        Raises:
            NumericsError: a sum is not finite.
        """
        moments = {}
        for group, linears in self.groups().items():
            tokens = self._tokens[group]
            share = weight / tokens
            gradient = {name: self._gradient_sums[name] * share for name in linears} if self._gradient else {}
            upper = self._sums[group].triu() * share
            moment = Moment(upper + upper.triu(1).T, weight, gradient)
            if not all(tensor.isfinite().all() for tensor in (moment.total, *gradient.values())):
                raise NumericsError(
                    f"the inputs of {where}.{group} are not finite on this domain: "
                    "check the base model there, or set model.dtype to float32"
                )
            moments[group] = moment
        return moments

    def _before(self, name: str, x: Tensor) -> None:
        for seen, group in self._inputs:
            if seen is x:
                self._group_of.setdefault(name, group)
                return
        group = self._group_of.setdefault(name, name)
        self._inputs.append((x, group))
        tokens = x.reshape(-1, x.shape[-1]).float()
        if group not in self._sums:
            self._sums[group] = tokens.new_zeros(x.shape[-1], x.shape[-1])
        _add_upper(self._sums[group], tokens)
        self._tokens[group] = self._tokens.get(group, 0) + len(tokens)

    def _after(self, name: str, x: Tensor, y: Tensor) -> None:
        bias = self._linears[name].bias
        output = (y - bias if isinstance(bias, Tensor) else y).reshape(-1, y.shape[-1]).float()
        product = (output * output).T @ x.reshape(-1, x.shape[-1]).float().square()
        name_seen = name in self._gradient_sums
        self._gradient_sums[name] = self._gradient_sums[name].add_(product) if name_seen else product


def _add_upper(total: Tensor, tokens: Tensor, panels: int = 4) -> None:
    """Add tokens^T tokens (I, I), of `tokens` (T, I), to the upper triangle of `total`; below it nothing is defined.

    In panels of rows from the diagonal on: with four, 5/8 of the whole product.
    """
    features = tokens.shape[1]
    width = -(-features // panels)
    for start in range(0, features, width):
        rows = tokens[:, start : start + width]
        total[start : start + width, start:].addmm_(rows.T, tokens[:, start:])


@contextmanager
def record_moments(block: nn.Module, *, gradient: bool) -> Iterator[MomentRecorder]:
    """Record the moments of everything that runs through `block` inside the `with`."""
    recorder = MomentRecorder(block, gradient=gradient)
    hooks = [block.register_forward_hook(lambda *_: recorder._inputs.clear())]
    for name, linear in recorder._linears.items():
        hooks.append(linear.register_forward_pre_hook(lambda _, args, name=name: recorder._before(name, args[0])))
        if gradient:
            hooks.append(linear.register_forward_hook(lambda _, args, y, name=name: recorder._after(name, args[0], y)))
    try:
        yield recorder
    finally:
        for hook in hooks:
            hook.remove()


def scores(weight: Tensor, second: Tensor, gradient: Tensor | None = None) -> Tensor:
    """Score (O, I) of each weight; the higher, the more the output suffers without it.

    Without `gradient` the criterion `output`: |W_kl| sqrt(G_ll), the root mean square by which y_k moves if W_kl goes
    (Wanda's score, Sun et al. 2023, over all domains). With it the criterion `gradient`:
    |W_kl| sqrt(E[(y_k x_l)^2]), the weight times the root mean square of the gradient of |y|^2 / 2 (ours).
    """
    squares = second.diagonal().clamp_min(0) if gradient is None else gradient
    return weight.abs() * squares.sqrt()


def output_energy(weight: Tensor, second: Tensor) -> float:
    """tr(W G W^T): the mean square of the output of `weight` (O, I) over the tokens of `second` (I, I)."""
    return ((weight @ second) * weight).sum().item()


def fold(matrix: Tensor) -> Tensor:
    """The part off the diagonal of a symmetric (I, I) matrix as (2, J, J): each number once, without an index.

    In blocks [[A, B], [B^T, C]], the first is B, the second the strict upper triangle of A together with the strict
    lower triangle of C.
    """
    size, half = len(matrix), (len(matrix) + 1) // 2
    even = torch.zeros(2 * half, 2 * half, device=matrix.device, dtype=matrix.dtype)
    even[:size, :size] = matrix
    return torch.stack((even[:half, half:], even[:half, :half].triu(1) + even[half:, half:].tril(-1)))


def unfold(folded: Tensor, diagonal: Tensor) -> Tensor:
    """The inverse of `fold`, with `diagonal` (I,); symmetric to the last bit."""
    size, half = len(diagonal), folded.shape[-1]
    corner, triangles = folded
    even = torch.zeros(2 * half, 2 * half, device=folded.device, dtype=folded.dtype)
    even[:half, half:] = corner
    even[:half, :half] = triangles.triu(1)
    even[half:, half:] = triangles.tril(-1).T
    matrix = (even + even.T)[:size, :size]
    matrix.diagonal().copy_(diagonal)
    return matrix


def pack(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A symmetric (I, I) matrix as its diagonal, float32, and its correlations (2, J, J), float16, folded.

    |G_kl| <= sqrt(G_kk G_ll) for a second moment, so float16 keeps 11 bits of each correlation whatever the scale of
    its channels (ours).
    """
    diagonal = matrix.diagonal().clamp_min(0)
    scale = torch.where(diagonal > 0, diagonal.rsqrt(), 0.0)
    return diagonal, fold(matrix * torch.outer(scale, scale)).to(torch.float16)


def unpack(diagonal: Tensor, correlations: Tensor) -> Tensor:
    """The (I, I) float32 matrix that `pack` took; symmetric to the last bit."""
    root = diagonal.sqrt()
    unit = unfold(correlations.float(), torch.ones_like(diagonal))
    matrix = unit * torch.outer(root, root)
    matrix.diagonal().copy_(diagonal)
    return matrix
