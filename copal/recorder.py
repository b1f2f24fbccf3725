"""Statistics of the linears of one block, taken by hooks while the block runs.

    with MomentRecorder(block, gradient=False) as recorder:
        block(hidden_states)
    moments = recorder.moments(weight=1.0, where="model.layers.0")

Two kinds of tokens do not simply count 1, and both rules are ours:

- Of a linear that writes to the residual stream, a token counts rho = 1 / (mean square of the hidden state after the
  block). The next norm divides what the linear adds by the size of that hidden state; without rho the few tokens with
  massive activations (Sun et al. 2024, arXiv 2402.17762) decide its mask. Such a linear is known by its shape: alone on
  its input, and with as many outputs as hidden states have features.
- Of an expert, a token that the router sends elsewhere counts `OTHERS_SHARE`.

Shapes: B windows of a batch, L tokens of a window, H hidden size, T tokens, I in features, O out features.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from copal.architecture import find_linears, hidden_states, shape_of
from copal.errors import NumericsError
from copal.experts import Experts
from copal.processes import gather, sum_by_name
from copal.sensitivity import Moment, inverse_mean_square, squares

__all__ = ["OTHERS_SHARE", "MomentRecorder", "product_operations"]

OTHERS_SHARE = 0.01
"""What a token counts in the moments of an expert to which it is not routed; one that is routed there counts 1 (ours).

So an expert with many tokens of its own is pruned for those, and one with few or none for all tokens of its layer.
There is no threshold between the two: moments stay sums over tokens, and domains add up in any order. On a Mixtral of 8
small experts trained on bytes, pruned by 80%, shares from 1e-6 to 0.01 differed by less than 1% in perplexity; a share
of 1, as if there were no routing, cost 3 to 6%.
"""

_SMALL = 1024  # features of a product over tokens
_TOKENS_OF_A_PRODUCT = 512  # in one 16-bit product over tokens of an expert, which come in any number


class MomentRecorder:
    """A context manager that sums x x^T over the tokens that reach the linears of `block` inside the `with`.

    Linears that are handed the very same tensor form a group and share one sum: that is how query/key/value and gate/up
    are found. A forward pass that fails half-way adds nothing. On leaving, the sums of all processes are added up
    (`copal.processes`); groups, counts and moments are asked for after that.
    """

    def __init__(self, block: nn.Module, *, gradient: bool) -> None:
        """`gradient`: also sum (y_k x_l)^2, for the criterion `gradient`."""
        self._block = block
        self._linears = find_linears(block)
        self._gradient = gradient
        self._hooks: list[RemovableHandle] = []
        self._group_of: dict[str, str] = {}
        self._sums: dict[str, Tensor] = {}
        self._gradient_sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._routed: dict[str, int] = {}
        # Of the forward pass that is under way:
        self._inputs: list[_Input] = []
        self._outputs: dict[str, list[tuple[_Input, Tensor]]] = {}
        self._rows: Tensor | None = None
        self._share = 1.0

    def __enter__(self) -> Self:
        hooks, block = self._hooks, self._block
        hooks.append(block.register_forward_pre_hook(lambda *_: self._forget()))
        hooks.append(block.register_forward_hook(lambda _, __, out: self._finish(hidden_states(out))))
        for name, linear in self._linears.items():
            hooks.append(linear.register_forward_pre_hook(lambda _, args, name=name: self._before(name, args[0])))
            if self._gradient:
                hooks.append(linear.register_forward_hook(lambda _, args, y, name=name: self._after(name, args[0], y)))
        for experts in [module for module in block.modules() if isinstance(module, Experts)]:
            hooks.append(experts.register_forward_hook(lambda module, args, _: self._others(module, *args[:2])))
            for expert in experts:
                hooks.append(expert.register_forward_pre_hook(lambda _, args: self._see_rows(args[1])))
                hooks.append(expert.register_forward_hook(lambda *_: self._see_rows(None)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        if kind is None:
            self._add_up()

    def clear(self) -> None:
        """Forget everything: the block is about to run anew."""
        for kept in (self._group_of, self._sums, self._gradient_sums, self._tokens, self._routed):
            kept.clear()

    def groups(self) -> dict[str, list[str]]:
        """Group (named after its first linear) -> its linears, in the order in which they ran."""
        groups: dict[str, list[str]] = {}
        for linear, group in self._group_of.items():
            groups.setdefault(group, []).append(linear)
        return groups

    def routed(self, group: str) -> int:
        """Tokens that reached the group's linears in the model itself: of an expert, those that are routed to it."""
        return self._routed[group]

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Group -> (O, I), O of all its linears together."""
        shapes = {name: shape_of(linear) for name, linear in self._linears.items()}
        return {
            group: (sum(shapes[linear][0] for linear in linears), shapes[group][1])
            for group, linears in self.groups().items()
        }

    def writers(self, hidden_size: int) -> set[str]:
        """Linears that write to the residual stream: alone on their input, with H outputs."""
        alone = [linears[0] for linears in self.groups().values() if len(linears) == 1]
        return {linear for linear in alone if shape_of(self._linears[linear])[0] == hidden_size}

    def moments(self, weight: float, where: str) -> dict[str, Moment]:
        """The moments of all tokens, by group. Can be asked for once: to save memory the sums become the moments.

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

    def _forget(self) -> None:
        """A forward pass begins or has ended."""
        self._inputs, self._outputs, self._rows = [], {}, None

    def _before(self, name: str, x: Tensor) -> None:
        """The linear `name` is about to read `x`."""
        for seen in self._inputs:
            if seen.x is x:
                self._group_of.setdefault(name, seen.group)
                return
        self._inputs.append(_Input(x, self._group_of.setdefault(name, name), self._rows, self._share))

    def _after(self, name: str, x: Tensor, y: Tensor) -> None:
        """The linear `name` has made `y` of `x`."""
        seen = next(seen for seen in self._inputs if seen.x is x)
        self._outputs.setdefault(name, []).append((seen, y))

    def _see_rows(self, rows: Tensor | None) -> None:
        """Which of the layer's tokens the expert that is about to run reads; None: it has run."""
        self._rows = rows

    def _others(self, experts: Experts, hidden_states: Tensor, top_k_index: Tensor) -> None:
        """Run every expert on the tokens that are routed elsewhere; what it makes of them is dropped."""
        self._share = OTHERS_SHARE
        try:
            for expert, others in zip(experts, experts.others(top_k_index), strict=True):
                expert(hidden_states[others], others)
        finally:
            self._share = 1.0

    def _finish(self, hidden: Tensor) -> None:
        """The block has run and gives `hidden` (B, L, H): only now is anything added to the sums."""
        rho = inverse_mean_square(hidden)
        writers = self.writers(hidden.shape[-1])
        weights = [_token_weights(seen, rho, seen.group in writers) for seen in self._inputs]
        for seen, weight in zip(self._inputs, weights, strict=True):
            self._add(seen, weight, hidden.shape[-2] if seen.rows is None else _TOKENS_OF_A_PRODUCT)
        for name, outputs in self._outputs.items():
            for seen, y in outputs:
                self._add_gradient(name, seen, y, weights[self._inputs.index(seen)])
        self._forget()

    def _add(self, seen: _Input, weights: Tensor | float, at_a_time: int) -> None:
        """Add what a group has read to its sum x x^T and its counts."""
        tokens = seen.x.reshape(-1, seen.x.shape[-1])
        if seen.group not in self._sums:
            self._sums[seen.group] = tokens.new_zeros(tokens.shape[1], tokens.shape[1], dtype=torch.float32)
            self._tokens[seen.group] = self._routed[seen.group] = 0
        _add_upper(self._sums[seen.group], tokens, weights, at_a_time)
        self._tokens[seen.group] += len(tokens)
        self._routed[seen.group] += len(tokens) if seen.share == 1 else 0

    def _add_gradient(self, name: str, seen: _Input, y: Tensor, weights: Tensor | float) -> None:
        """Add to the sum of (y_k x_l)^2 of one linear; y = W x, so its bias is taken off."""
        bias = self._linears[name].bias
        of_outputs = squares(y - bias if isinstance(bias, Tensor) else y).mul_(weights)
        product = of_outputs.T @ squares(seen.x)
        known = name in self._gradient_sums
        self._gradient_sums[name] = self._gradient_sums[name].add_(product) if known else product

    def _add_up(self) -> None:
        """Make counts and sums those of all processes; a linear that ran in any of them is known to all."""
        known = gather((self._group_of, self._tokens, self._routed))
        self._group_of = {linear: group for group_of, _, _ in known for linear, group in group_of.items()}
        groups = self.groups()
        self._tokens = {group: sum(tokens.get(group, 0) for _, tokens, _ in known) for group in groups}
        self._routed = {group: sum(routed.get(group, 0) for _, _, routed in known) for group in groups}
        self._sums = sum_by_name(self._sums)
        self._gradient_sums = sum_by_name(self._gradient_sums)


@dataclass(frozen=True, slots=True, eq=False)
class _Input:
    """What a group read: x (..., I), which of the block's tokens these are (None: all), and what each counts."""

    x: Tensor
    group: str
    rows: Tensor | None
    share: float


def _token_weights(seen: _Input, rho: Tensor, writes: bool) -> Tensor | float:
    """What each token of an input counts: its share, times rho (T, 1) where the group writes to the residual stream."""
    counted = rho if seen.rows is None else rho[seen.rows]
    known = writes and len(counted) == seen.x.shape[:-1].numel()
    return seen.share * counted if known else seen.share


def _add_upper(total: Tensor, tokens: Tensor, weights: Tensor | float, at_a_time: int) -> None:
    """Add sum_t weights_t x_t x_t^T of `tokens` (T, I) to the upper triangle of `total`; below it nothing is defined.

    Products have the dtype of `tokens`. A 16-bit product is rounded: only `at_a_time` tokens go into one (those of a
    window, whatever the batch or the process), and the diagonal is summed in float32.
    Measured, correlations are then off by 4e-5 (root mean square), about what storing them in float16 costs.
    """
    exact = tokens.dtype == torch.float32
    strips = _strips(tokens.shape[1], tokens.dtype)
    scaled = tokens if isinstance(weights, float) and weights == 1 else (tokens.float() * weights**0.5).to(tokens.dtype)
    for part in (scaled,) if exact else torch.split(scaled, at_a_time):
        before = total.diagonal().clone()
        for start, end in strips:
            total[start:end, start:] += part[:, start:end].T @ part[:, start:]
        if not exact:
            total.diagonal().copy_(before + squares(part).sum(0))


def _strips(features: int, dtype: torch.dtype) -> list[tuple[int, int]]:
    """First row and end of each strip of an (I, I) triangle; a strip goes from the diagonal to the right.

    With four of them, 5/8 of the whole square is covered. A small 16-bit product is done sooner as a whole.
    """
    width = -(-features // 4) if dtype == torch.float32 or features > _SMALL else features
    return [(start, min(start + width, features)) for start in range(0, features, width)]


def product_operations(features: int, dtype: torch.dtype) -> int:
    """Operations for one token of `features` in `dtype` that is added to a sum x x^T."""
    return sum(2 * (end - start) * (features - start) for start, end in _strips(features, dtype))
