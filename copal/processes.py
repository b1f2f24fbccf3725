"""Several processes that run the same step together, each with its share of the windows.

`accelerate launch` starts them, one on each GPU or several on a CPU. A program that was started in another way is one
process: its share is everything, and nothing is sent.

Every process calls the same functions in the same order with the same arguments (the device may differ), and what is
summed here is the same in all of them afterwards. Where one fails, `accelerate launch` ends the others, which would
wait for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import Tensor, distributed

from copal.errors import SettingsError

__all__ = [
    "device",
    "from_main",
    "gather",
    "is_main",
    "number",
    "processes",
    "share",
    "share_of_windows",
    "sum_by_name",
    "tensors_from_main",
]

_T = TypeVar("_T")
_Items = TypeVar("_Items", Tensor, list[Any])

# How long a process waits for another, which may be flushing a checkpoint to a slow disk.
_PATIENCE = timedelta(days=1)


def device() -> torch.device:
    """Where this process computes: its own CUDA GPU where there is one, else the CPU."""
    kind = _state().device
    return kind if kind.type == "cuda" else torch.device("cpu")  # others have no float64, and do not tell what is free


def is_main() -> bool:
    """Whether this process is the one that writes."""
    return bool(_state().is_main_process)


def number() -> int:
    """Of this process, from 0."""
    return int(_state().process_index)


def processes() -> int:
    """How many there are."""
    return int(_state().num_processes)


def share(items: _Items) -> _Items:
    """This process's part of `items`: every n-th, as even as can be; it may be empty."""
    state = _state()
    return items[state.process_index :: state.num_processes]


def share_of_windows(windows: Tensor) -> Tensor:
    """This process's part of `windows` (N, L).

    Raises:
        SettingsError: there are fewer windows than processes.
    """
    if len(windows) < processes():
        raise SettingsError(f"model.processes is {processes()}, but there are {len(windows)} windows: lower it to that")
    return share(windows)


def gather(value: _T) -> list[_T]:
    """The `value` of every process, in the order of the processes; for small things."""
    if processes() == 1:
        return [value]
    values: list[Any] = [None] * processes()
    distributed.all_gather_object(values, value)
    return values


def sum_by_name(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sums of float32 tensors over the processes, in place; a tensor that a process does not have counts as zero."""
    if processes() == 1:
        return dict(tensors)
    shapes: dict[str, tuple[int, ...]] = {}
    for known in gather({name: tuple(tensor.shape) for name, tensor in tensors.items()}):
        shapes |= known
    sums = {}
    for name, shape in shapes.items():
        sums[name] = tensors[name] if name in tensors else torch.zeros(shape, device=device())
        distributed.all_reduce(sums[name])
    return sums


def from_main(value: _T) -> _T:
    """The main process's `value`; the others wait for it."""
    if processes() == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def tensors_from_main(tensors: Mapping[str, Tensor] | None, here: torch.device) -> dict[str, Tensor]:
    """The main process's `tensors` on `here`, where this process computes; the others hand in None."""
    found = {} if tensors is None else {name: tensor.to(here).contiguous() for name, tensor in tensors.items()}
    if processes() == 1:
        return found
    kinds = from_main({name: (tensor.shape, tensor.dtype) for name, tensor in found.items()})
    for name, (shape, dtype) in kinds.items():
        if tensors is None:
            found[name] = torch.empty(shape, dtype=dtype, device=here)
        distributed.broadcast(found[name], src=0)
    return found


def _state() -> PartialState:
    """What accelerate knows about this process; the first call joins the others."""
    on_cpu = distributed.is_torchelastic_launched() and not torch.cuda.is_available()  # else it sees one process
    return PartialState(cpu=on_cpu, timeout=_PATIENCE)
