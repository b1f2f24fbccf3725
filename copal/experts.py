"""Mixture of experts as linears: what hooks, statistics and checkpoints see is one linear per expert and matrix.

transformers keeps the experts of a layer in two 3-D parameters and multiplies them in one kernel; checkpoints hold each
expert's matrices apart. Here they are apart in the model as well.

Shapes: T tokens, K experts that a token is routed to, E experts, H hidden size, F intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from copal.errors import ModelError

__all__ = ["Experts", "find_routers", "split_experts"]

_FLAGS = {"is_concatenated": True, "is_transposed": False, "has_gate": True, "has_bias": False}


class Expert(nn.Module):
    """One gated feed-forward network: down(activation(gate(x)) * up(x))."""

    def __init__(self, hidden: int, intermediate: int, apply_gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)
        self._apply_gate = apply_gate

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        """What it makes of `x` (T, H); `rows`, indices or a mask, tells hooks which of the layer's tokens these are."""
        gate_up = torch.cat((self.gate_proj(x), self.up_proj(x)), dim=-1)
        return self.down_proj(self._apply_gate(gate_up))  # type: ignore[no-any-return]


class Experts(nn.ModuleList):
    """The experts of a layer. Takes what the fused module of transformers takes, and gives the same."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum (T, H) of each token's experts; `top_k_index` and `top_k_weights` are (T, K)."""
        output = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            token, place = torch.where(top_k_index == number)
            routed = expert(hidden_states[token], token) * top_k_weights[token, place, None]
            output.index_add_(0, token, routed.to(output.dtype))
        return output

    def others(self, top_k_index: Tensor) -> list[Tensor]:
        """For each expert, which of the layer's tokens are not routed to it: boolean (T,)."""
        return [(top_k_index != number).all(-1) for number in range(len(self))]


def split_experts(model: nn.Module) -> None:
    """Replace every fused module of experts in `model` by an `Experts` whose weights are on the meta device.

    Raises:
        ModelError: a module holds matrices of experts in another layout.
    """
    for name, module in list(model.named_modules()):
        stacks = {key: tuple(p.shape) for key, p in module.named_parameters(recurse=False) if _is_stack(p)}
        if not stacks or isinstance(module, nn.Conv1d):
            continue
        experts, hidden, intermediate = stacks.get("down_proj", (0, 0, 0))
        as_flagged = all(getattr(module, flag, None) is value for flag, value in _FLAGS.items())
        wanted = {"gate_up_proj": (experts, 2 * intermediate, hidden), "down_proj": (experts, hidden, intermediate)}
        if stacks != wanted or not as_flagged or getattr(module, "has_post_expert_norm", False):
            raise ModelError(
                f"{type(model).__name__} keeps matrices in {name} that copal cannot take apart: looked for experts "
                "with gate_up_proj (E, 2F, H) and down_proj (E, H, F), neither transposed nor interleaved, without bias"
            )
        with torch.device("meta"):
            split = Experts(Expert(hidden, intermediate, module._apply_gate) for _ in range(experts))
        model.set_submodule(name, split.eval())


def find_routers(block: nn.Module) -> set[nn.Module]:
    """Linears of `block` that choose or weigh experts.

    They are known by their place: the only linear in a module beside an `Experts`, with at most as many outputs as that
    has experts. Routers that are no linears are not among them.
    """
    routers: set[nn.Module] = set()
    for parent in block.modules():
        for experts in [child for child in parent.children() if isinstance(child, Experts)]:
            for sibling in parent.children():
                linears = [module for module in sibling.modules() if isinstance(module, nn.Linear)]
                if len(linears) == 1 and linears[0].out_features <= len(experts):
                    routers.add(linears[0])
    return routers


def _is_stack(parameter: nn.Parameter) -> bool:
    return parameter.ndim == 3 and min(parameter.shape) > 1
