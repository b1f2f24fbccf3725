"""What the loss minds of each output of a linear: its Fisher information, from one walk back through the dense model.

For output k of a linear, over the tokens t of a domain that reach it:

    f_k = sum_t (dL / dy_tk)^2 / sum_t rho_t

with L the cross-entropy of a window, summed over its tokens, against labels that the model draws itself
(`copal.labels`): the diagonal of the Fisher information, taken at outputs. rho_t is what the token counts
in the second moment G of the same linear (`copal.recorder`): 1, or the inverse of the hidden state's mean square where
the linear writes to the residual stream; so f_k G_ll is the mean of squared gradients times a mean of squared inputs.
When weight W_kl goes, the loss moves to first order by f_k W_kl^2 G_ll in the mean square, as though gradient and input
were independent. That compares weights of different rows, linears and blocks, which the error of a linear's own output
cannot do. These formulas are ours.

Shapes: L tokens of a window, T tokens that reach a linear, H hidden size, O out features.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import reduce
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from copal.architecture import find_linears, hidden_states, shape_of
from copal.errors import NumericsError
from copal.experts import Experts
from copal.processes import gather, sum_by_name
from copal.sensitivity import inverse_mean_square, squares

__all__ = ["Fisher", "FisherRecorder", "add_fisher"]

Fisher = Mapping[str, Tensor]
"""Linear, by its name in the model -> sum_i w_i f_i (O,) float32, over one or more domains."""


class FisherRecorder:
    """A context manager that sums the squared gradients at the outputs of the linears of `block`.

    Inside the `with`, windows run through the block under autograd and their gradient comes back. On leaving, the sums
    of all processes are added up.
    """

    def __init__(self, block: nn.Module, writers: Collection[str]) -> None:
        """`writers`: linears of the block that write to the residual stream (`MomentRecorder.writers`)."""
        self._block, self._writers = block, writers
        self._linears = find_linears(block)
        self._hooks: list[RemovableHandle] = []
        self._sums: dict[str, Tensor] = {}
        self._counted: dict[str, float] = {}
        self._rows: Tensor | None = None
        self._rho: Tensor | None = None  # (T,), of the layer's tokens

    def __enter__(self) -> Self:
        self._hooks.append(self._block.register_forward_hook(lambda _, __, out: self._measure(hidden_states(out))))
        for name, linear in self._linears.items():
            self._hooks.append(linear.register_forward_hook(lambda _, __, y, name=name: self._watch(name, y)))
        for experts in [module for module in self._block.modules() if isinstance(module, Experts)]:
            for expert in experts:
                self._hooks.append(expert.register_forward_pre_hook(lambda _, args: self._see_rows(args[1])))
                self._hooks.append(expert.register_forward_hook(lambda *_: self._see_rows(None)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        if kind is None:
            self._sums = sum_by_name(self._sums)
            counts = gather(self._counted)
            self._counted = {name: sum(count.get(name, 0.0) for count in counts) for name in self._sums}

    def clear(self) -> None:
        """Forget everything: the block is about to run anew."""
        self._sums.clear()
        self._counted.clear()

    def fisher(self, weight: float, where: str) -> dict[str, Tensor]:
        """w f (O,) of each linear, by its name in the model; zeros for one that no token has reached.

        Args:
            weight: the domain's weight w.
            where: the block's name.

        Raises:
            NumericsError: a gradient is not finite.
        """
        found = {}
        for name, linear in self._linears.items():
            total = self._sums.get(name)
            if total is None:
                total = linear.get_parameter("weight").new_zeros(shape_of(linear)[0], dtype=torch.float32)
            if not total.isfinite().all():
                raise NumericsError(
                    f"the gradient of the loss at {where}.{name} is not finite on this domain: set model.dtype to "
                    "float32, or prune.criterion to output"
                )
            counted = self._counted.get(name, 0.0)
            found[f"{where}.{name}"] = total * (weight / counted if counted else 0.0)
        return found

    def _see_rows(self, rows: Tensor | None) -> None:
        """Which of the layer's tokens the expert that is about to run reads; None: it has run."""
        self._rows = rows

    def _measure(self, hidden: Tensor) -> None:
        """The block gives `hidden` (..., H): what does each token count?"""
        self._rho = inverse_mean_square(hidden.detach()).squeeze(1)

    def _watch(self, name: str, y: Tensor) -> None:
        """The linear `name` has made `y` (..., O): its gradient is awaited."""
        rows = self._rows
        if y.requires_grad:
            y.register_hook(lambda gradient: self._add(name, gradient.detach(), rows))  # type: ignore[no-untyped-call]

    def _add(self, name: str, gradient: Tensor, rows: Tensor | None) -> None:
        """Add the `gradient` at the outputs of `name`, of all tokens or of `rows`."""
        total = squares(gradient).sum(0)
        counted = float(gradient.shape[:-1].numel())
        if name in self._writers:
            assert self._rho is not None
            rho = self._rho if rows is None else self._rho[rows]
            counted = float(rho.sum()) if len(rho) == counted else counted
        self._sums[name] = self._sums[name].add_(total) if name in self._sums else total
        self._counted[name] = self._counted.get(name, 0.0) + counted


def add_fisher(parts: Iterable[Fisher]) -> dict[str, Tensor]:
    """Add up the Fisher information of several domains, in the order given."""
    return reduce(lambda one, other: {name: one[name] + other[name] for name in one}, map(dict, parts))
