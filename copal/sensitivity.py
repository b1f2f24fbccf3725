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

from copal.architecture import find_linears, shape_of
from copal.errors import NumericsError
from copal.experts import Experts
from copal.processes import gather, sum_by_name

__all__ = [
    "Moment",
    "MomentRecorder",
    "correlations",
    "fold",
    "merge",
    "output_energy",
    "pack",
    "record_moments",
    "scores",
    "unfold",
    "unpack",
]


_TOKENS_OF_A_PRODUCT = 512

OTHERS_SHARE = 0.01
"""What a token counts in the moments of an expert to which it is not routed; one that is routed there counts 1 (ours).

An expert with many tokens of its own is pruned for them, one with few or none for every token of its layer. Without a
threshold the moments stay sums over tokens, so that domains add up in any order. On a Mixtral of 8 small experts
trained on bytes, pruned by 80%, shares from 1e-6 to 0.01 differed by less than 1% in perplexity; 1, routing ignored,
cost 3 to 6%.
"""


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
    Experts are shown the tokens that are routed elsewhere too: see `OTHERS_SHARE`.

    What a linear adds to the residual stream is divided by the size of that stream in the next norm, so its tokens
    count by rho = 1 / (mean square of the hidden state after the block): else the few tokens with massive activations
    (Sun et al. 2024, arXiv 2402.17762) decide its mask (ours). Such a linear is known by its shape: alone on its input,
    with as many outputs as hidden states have features.
    """

    def __init__(self, block: nn.Module, *, gradient: bool) -> None:
        self._linears = find_linears(block)
        self._gradient = gradient
        self._group_of: dict[str, str] = {}
        self._sums: dict[str, Tensor] = {}
        self._gradient_sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._routed: dict[str, int] = {}
        # Of the forward that is under way:
        self._inputs: list[_Input] = []
        self._outputs: dict[str, list[tuple[_Input, Tensor]]] = {}
        self._rows: Tensor | None = None
        self._share = 1.0

    def groups(self) -> dict[str, list[str]]:
        """Group (named after its first linear) -> its linears, in the order in which they ran."""
        groups: dict[str, list[str]] = {}
        for linear, group in self._group_of.items():
            groups.setdefault(group, []).append(linear)
        return groups

    def routed(self, group: str) -> int:
        """Tokens so far that reached the group's linears in the model itself: of an expert, those routed to it."""
        return self._routed[group]

    def clear(self) -> None:
        """Forget everything: the block is about to run anew."""
        for kept in (self._group_of, self._sums, self._gradient_sums, self._tokens, self._routed):
            kept.clear()

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Group -> (O, I), O of all its linears together."""
        shapes = {name: shape_of(linear) for name, linear in self._linears.items()}
        return {
            group: (sum(shapes[linear][0] for linear in linears), shapes[group][1])
            for group, linears in self.groups().items()
        }

    def moments(self, weight: float, where: str) -> dict[str, Moment]:
        """The moments of all tokens, by group; can be asked for once, since the sums become the moments.

        Args:
            weight: the domain's weight w_i.
            where: the block's name, for the error.

        Raises:
            NumericsError: a sum is not finite.
        """
        moments = {}
        for group, linears in self.groups().items():
            share = weight / self._tokens[group]
            gradient = {name: self._gradient_sums.pop(name).mul_(share) for name in linears} if self._gradient else {}
            upper = self._sums.pop(group).triu_().mul_(share)
            moment = Moment(upper + upper.triu(1).T, weight, gradient)
            if not all(tensor.isfinite().all() for tensor in (moment.total, *gradient.values())):
                raise NumericsError(
                    f"the inputs of {where}.{group} are not finite on this domain: "
                    "check the base model there, or set model.dtype to float32"
                )
            moments[group] = moment
        return moments

    def _add_up(self) -> None:
        """Make counts and sums those of all processes; a linear that ran in any of them is known to all."""
        known = gather((self._group_of, self._tokens, self._routed))
        self._group_of = {linear: group for group_of, _, _ in known for linear, group in group_of.items()}
        groups = self.groups()
        self._tokens = {group: sum(tokens.get(group, 0) for _, tokens, _ in known) for group in groups}
        self._routed = {group: sum(routed.get(group, 0) for _, _, routed in known) for group in groups}
        self._sums = sum_by_name(self._sums)
        self._gradient_sums = sum_by_name(self._gradient_sums)

    def _before(self, name: str, x: Tensor) -> None:
        for seen in self._inputs:
            if seen.x is x:
                self._group_of.setdefault(name, seen.group)
                return
        self._inputs.append(_Input(x, self._group_of.setdefault(name, name), self._rows, self._share))

    def _after(self, name: str, x: Tensor, y: Tensor) -> None:
        seen = next(seen for seen in self._inputs if seen.x is x)
        self._outputs.setdefault(name, []).append((seen, y))

    def _finish(self, hidden: Tensor) -> None:
        """The block has run and gives `hidden` (B, L, H): only now is anything added to the sums."""
        features = hidden.shape[-1]
        size = hidden.reshape(-1, features).float().square().mean(1, keepdim=True)
        rho = torch.where(size > 0, size.reciprocal(), 0.0)
        alone = {group: linears for group, linears in self.groups().items() if len(linears) == 1}
        writers = {group for group, (linear,) in alone.items() if shape_of(self._linears[linear])[0] == features}

        def weights(seen: _Input) -> Tensor | float:
            counted = rho if seen.rows is None else rho[seen.rows]
            known = seen.group in writers and len(counted) == seen.x.shape[:-1].numel()
            return seen.share * counted if known else seen.share

        for seen in self._inputs:
            tokens = seen.x.reshape(-1, seen.x.shape[-1])
            if seen.group not in self._sums:
                self._sums[seen.group] = tokens.new_zeros(tokens.shape[1], tokens.shape[1], dtype=torch.float32)
                self._tokens[seen.group] = self._routed[seen.group] = 0
            at_a_time = hidden.shape[-2] if seen.rows is None else _TOKENS_OF_A_PRODUCT
            _add_upper(self._sums[seen.group], tokens, weights(seen), at_a_time)
            self._tokens[seen.group] += len(tokens)
            self._routed[seen.group] += len(tokens) if seen.share == 1 else 0
        for name, outputs in self._outputs.items():
            for seen, y in outputs:
                bias = self._linears[name].bias
                squares = (y - bias if isinstance(bias, Tensor) else y).reshape(-1, y.shape[-1]).float().square()
                product = (squares * weights(seen)).T @ seen.x.reshape(-1, seen.x.shape[-1]).float().square()
                known = name in self._gradient_sums
                self._gradient_sums[name] = self._gradient_sums[name].add_(product) if known else product
        self._forget()

    def _forget(self) -> None:
        self._inputs, self._outputs, self._rows = [], {}, None

    def _others(self, experts: Experts, hidden_states: Tensor, top_k_index: Tensor) -> None:
        """Run every expert on the tokens that are routed elsewhere; what it makes of them is dropped."""
        self._share = OTHERS_SHARE
        try:
            for expert, others in zip(experts, experts.others(top_k_index), strict=True):
                expert(hidden_states[others], others)
        finally:
            self._share = 1.0


@dataclass(frozen=True, slots=True)
class _Input:
    """What a group read: x (..., I), which of the block's tokens these are (None: all), and what each counts."""

    x: Tensor
    group: str
    rows: Tensor | None
    share: float


def _add_upper(total: Tensor, tokens: Tensor, weights: Tensor | float, at_a_time: int, panels: int = 4) -> None:
    """Add sum_t weights_t x_t x_t^T of `tokens` (T, I) to the upper triangle of `total`; below it nothing is defined.

    In panels of rows from the diagonal on: with four, 5/8 of the whole product. Products have the dtype of `tokens`. A
    16-bit product is rounded, so only a window goes into one (whatever the batch or the process), and the diagonal is
    float32 all through: measured, correlations are then off by 4e-5 (root mean square), about what storing them in
    float16 costs.
    """
    features = tokens.shape[1]
    width = -(-features // panels)
    exact = tokens.dtype == torch.float32
    scaled = tokens if isinstance(weights, float) and weights == 1 else (tokens.float() * weights**0.5).to(tokens.dtype)
    for part in (scaled,) if exact else torch.split(scaled, at_a_time):
        before = total.diagonal().clone()
        for start in range(0, features, width):
            total[start : start + width, start:] += part[:, start : start + width].T @ part[:, start:]
        if not exact:
            total.diagonal().copy_(before + part.float().square().sum(0))


@contextmanager
def record_moments(block: nn.Module, *, gradient: bool) -> Iterator[MomentRecorder]:
    """Record the moments of everything that runs through `block` inside the `with`, in any process.

    A forward that fails half-way leaves no trace.
    """
    recorder = MomentRecorder(block, gradient=gradient)
    hooks = [
        block.register_forward_pre_hook(lambda *_: recorder._forget()),
        block.register_forward_hook(lambda _, __, out: recorder._finish(out[0] if isinstance(out, tuple) else out)),
    ]
    for name, linear in recorder._linears.items():
        hooks.append(linear.register_forward_pre_hook(lambda _, args, name=name: recorder._before(name, args[0])))
        if gradient:
            hooks.append(linear.register_forward_hook(lambda _, args, y, name=name: recorder._after(name, args[0], y)))
    for experts in [module for module in block.modules() if isinstance(module, Experts)]:
        hooks.append(experts.register_forward_hook(lambda module, args, _: recorder._others(module, *args[:2])))
        for expert in experts:
            hooks.append(expert.register_forward_pre_hook(lambda _, args: setattr(recorder, "_rows", args[1])))
            hooks.append(expert.register_forward_hook(lambda *_: setattr(recorder, "_rows", None)))
    try:
        yield recorder
        recorder._add_up()
    finally:
        for hook in hooks:
            hook.remove()


def scores(weight: Tensor, second: Tensor, exponent: float, gradient: Tensor | None = None) -> Tensor:
    """Score (O, I) of each weight; the higher, the more the output suffers without it.

    Without `gradient` the criterion `output`: |W_kl| G_ll^exponent. With an exponent of 1/2 that is the root mean
    square by which y_k moves if W_kl goes (Wanda's score, Sun et al. 2023, over all domains); a lower one tempers
    massive channels (as in RIA, Zhang et al. 2024, which takes 1/4). With it the criterion `gradient`:
    |W_kl| E[(y_k x_l)^2]^exponent; with 1/2, the weight times the root mean square of the gradient of |y|^2 / 2 (ours).
    """
    squares = second.diagonal().clamp_min(0) if gradient is None else gradient
    return weight.abs() * squares.pow(exponent)


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


def correlations(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The diagonal (I,) of a second moment (I, I), and its entries by the roots of that; zero for a dead channel."""
    diagonal = matrix.diagonal().clamp_min(0)
    scale = torch.where(diagonal > 0, diagonal.rsqrt(), 0.0)
    return diagonal, matrix * torch.outer(scale, scale)


def pack(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A symmetric (I, I) matrix as its diagonal, float32, and its correlations (2, J, J), float16, folded.

    |G_kl| <= sqrt(G_kk G_ll) for a second moment, so float16 keeps 11 bits of each correlation whatever the scale of
    its channels (ours).
    """
    diagonal, unit = correlations(matrix)
    return diagonal, fold(unit).to(torch.float16)


def unpack(diagonal: Tensor, correlations: Tensor) -> Tensor:
    """The (I, I) float32 matrix that `pack` took; symmetric to the last bit."""
    root = diagonal.sqrt()
    unit = unfold(correlations.float(), torch.ones_like(diagonal))
    matrix = unit * torch.outer(root, root)
    matrix.diagonal().copy_(diagonal)
    return matrix
