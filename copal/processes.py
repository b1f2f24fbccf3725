"""Several processes that run the same step together, each with its share of the windows.

`accelerate launch` starts them, one on each GPU or several on a CPU, on one machine or on several that share no disk. A
program that was started in another way is one process: its share is everything, and nothing is sent.

Every process calls the same functions in the same order with the same arguments (the device may differ), and what is
summed here is the same in all of them afterwards. Where one fails, `accelerate launch` ends the others, which would
wait for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import Tensor, distributed

from copal.errors import SettingsError

__all__ = [
    "copy_from_main",
    "device",
    "from_main",
    "gather",
    "is_first_here",
    "is_main",
    "number",
    "processes",
    "share",
    "share_of_domains",
    "share_of_windows",
    "sum_by_name",
    "tensors_from_main",
]

_T = TypeVar("_T")
_Items = TypeVar("_Items", Tensor, list[Any])

# How long a process waits for another, which may be flushing a checkpoint to a slow disk.
_PATIENCE = timedelta(days=1)
_PIECE = 1 << 26  # bytes of a file that are sent at a time


def device() -> torch.device:
    """Where this process computes: its own CUDA GPU where there is one, else the CPU."""
    kind = _state().device
    return kind if kind.type == "cuda" else torch.device("cpu")  # others have no float64, and do not tell what is free


def is_main() -> bool:
    """Whether this process is the one that writes."""
    return bool(_state().is_main_process)


def is_first_here() -> bool:
    """Whether this process looks after what lies on its machine's disk; the main process does on its own."""
    return bool(_state().is_local_main_process)


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
    _check_enough(len(windows))
    return share(windows)


def share_of_domains(windows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This process's part of all domains' windows together, each (N, L): domains of which it has none are not in it.

    Shares differ by one window at most, whatever the domains have, and a domain's windows stay together as far as that
    lets them: they run through a block in whole batches.

    Raises:
        SettingsError: there are fewer windows than processes.
    """
    total = sum(map(len, windows.values()))
    _check_enough(total)
    first, end = (total * place // processes() for place in (number(), number() + 1))
    own, before = {}, 0
    for domain, tokens in windows.items():
        part = tokens[max(0, first - before) : max(0, end - before)]
        before += len(tokens)
        if len(part):
            own[domain] = part
    return own


def _check_enough(windows: int) -> None:
    if windows < processes():
        raise SettingsError(
            f"{processes()} processes (model.processes on each of model.nodes) cannot share {windows} "
            f"window{'s' * (windows != 1)}: lower them to that"
        )


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


def copy_from_main(folder: Path) -> None:
    """Give every other machine a copy of the files right in the main process's `folder`; each process says where its
    machine has, or wants, the folder. What is not flushed may be lost with the machine.

    Raises:
        OSError: a disk is full, or a file cannot be read.
    """
    writes = is_first_here() and not is_main()
    files = sorted(path for path in folder.iterdir() if path.is_file()) if is_main() else []
    sizes: dict[str, int] = from_main({path.name: path.stat().st_size for path in files})
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
    for name, size in sizes.items():
        with ExitStack() as opened:
            source = opened.enter_context((folder / name).open("rb")) if is_main() else None
            target = opened.enter_context((folder / name).open("wb")) if writes else None
            for start in range(0, size, _PIECE):
                data = source.read(min(_PIECE, size - start)) if source else None
                sent = tensors_from_main(
                    None if data is None else {"": torch.frombuffer(bytearray(data), dtype=torch.uint8)}, device()
                )
                if target:
                    target.write(sent[""].cpu().numpy().data)
    gather(None)  # nobody reads before all of it is there


def _state() -> PartialState:
    """What accelerate knows about this process; the first call joins the others."""
    on_cpu = distributed.is_torchelastic_launched() and not torch.cuda.is_available()  # else it sees one process
    return PartialState(cpu=on_cpu, timeout=_PATIENCE)
