"""Operations of tensor code and what it does to memory, counted while it runs; on fake tensors it takes neither."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

__all__ = ["Meter"]


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations of matrix products inside the `with`, and the bytes of what is made there and is alive.

    Attributes:
        operations: so far, by the dtype of what comes out; a multiplication and its addition are two.
        moved: bytes that operators other than products have read and written; views move nothing.
        most: bytes that were alive at one time.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = Counter[torch.dtype]()
        self.moved = self.most = self._now = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        there = _storages((args, kwargs))
        out = func(*args, **kwargs)
        made = {key: storage for key, storage in _storages(out).items() if key not in there}
        operations = _operations(func._overloadpacket, args, kwargs, out)
        if operations:
            self.operations[(out[0] if isinstance(out, tuple) else out).dtype] += operations
        elif made or func._schema.is_mutable:
            self.moved += sum(
                tensor.nbytes for tensor in tree_leaves((args, kwargs, out)) if isinstance(tensor, Tensor)
            )
        for key, storage in made.items():
            if key not in self._alive:
                self._add(key, storage)
        return out

    def _add(self, key: int, storage: torch.UntypedStorage) -> None:
        self._alive[key] = storage.nbytes()
        self._now += storage.nbytes()
        self.most = max(self.most, self._now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self._now -= self._alive.pop(key)


def _storages(values: Any) -> dict[int, torch.UntypedStorage]:
    """The memory of the tensors among `values`, by its address."""
    found = [tensor.untyped_storage() for tensor in tree_leaves(values) if isinstance(tensor, Tensor)]
    return {storage._cdata: storage for storage in found}


def _operations(packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Of one call of an operator, by torch's own table, which leaves out the kernels of attention on a CPU."""
    kernel = "_scaled_dot_product_flash_attention_for_cpu"
    if packet.__name__ == kernel:
        return int(sdpa_flop_count(*(tensor.shape for tensor in args[:3])))  # type: ignore[no-untyped-call]
    if packet.__name__ == f"{kernel}_backward":
        return int(sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4])))  # type: ignore[no-untyped-call]
    formula = flop_registry.get(packet)
    return int(formula(*args, **kwargs, out_val=out)) if formula else 0
