"""The sensitivity state of a model version on disk.

    state/
        manifest.json                              written last: all files are whole and belong together
        contribution/block-00000.safetensors ...   the statistics of the version's own domain, full or compact
        sum/block-00000.safetensors ...            their sum over every domain, float32: all that the next step loads

A contribution is never changed. Every version keeps its own, so contributions are what grows with the domains; a
version that took a domain out has none. The manifest says for every domain which version's state holds its
contribution. A sum is what the contributions give when they are added in the order in which they came: it can be made
again, and only the newest version's is needed. Nothing is pickled.

What full and compact storage keep of a second moment is in `copal.packing`. The sums of the criterion `gradient` come
on top of both, in bfloat16, and take as much as the linears themselves. With the criterion `loss`, contribution and sum
have a file fisher.safetensors each: one float32 number for every output of every linear (`copal.fisher`). A step uses
its own domain's statistics as they are read back from storage, rounding included: else the newest domain would count
otherwise than it does in later steps, and the order of the domains would matter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import reduce
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from copal.bounded import read_typed
from copal.checkpoint import save_shard
from copal.errors import StateError
from copal.files import sha256_file, write_json
from copal.fisher import Fisher
from copal.packing import fold, pack, pack_low_rank, ranks, unfold, unpack, unpack_low_rank
from copal.sensitivity import Moment, merge

__all__ = [
    "DomainEntry",
    "Manifest",
    "StateReader",
    "StateWriter",
    "as_moments",
    "contribution_tensors",
    "merge_blocks",
]

_FISHER = "fisher.safetensors"
SCHEMA = "copal.state/2"  # 2: tokens count by the residual stream; not to be added to statistics of 1

Moments = Mapping[str, Moment]
Shapes = Mapping[str, tuple[int, int]]
"""Group -> (O, I): out features of all its linears together, in features."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainEntry:
    """One domain of a state.

    Attributes:
        name: the domain.
        md5: version of its data.
        weight: w_i, fixed when it was merged.
        tokens: calibration tokens behind G_i.
        windows: calibration windows.
        version: model version whose state holds the contribution; None: this state itself.
        shards: file of the contribution -> its SHA-256.
    """

    name: str
    md5: str
    weight: float
    tokens: int
    windows: int
    version: int | None
    shards: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a state was made of.

    Attributes:
        base: fingerprint of the dense base model.
        statistics: fingerprint of the calibration settings: only equal ones may be summed.
        criterion: with `gradient` the state also holds the sums of (y_k x_l)^2, with `loss` the Fisher information.
        domains: every domain in the sum, by name.
        sum_shards: file of the sum -> its SHA-256.
    """

    base: str
    statistics: str
    criterion: str
    domains: tuple[DomainEntry, ...]
    sum_shards: Mapping[str, str]

    def require(self, *, base: str, statistics: str, criterion: str, where: Path) -> None:
        """Check that a step with these fingerprints may build on this state.

        Raises:
            StateError: it may not; says why.
        """
        if self.base != base:
            raise StateError(
                f"{where} was made for another base model ({self.base[:12]}, this one is {base[:12]}): "
                "use the base it was made for, or start a new lineage under another model.name"
            )
        if self.statistics != statistics:
            raise StateError(
                f"{where} was made with other calibration settings: "
                "put the old ones back in params.yaml, or start a new lineage under another model.name"
            )
        if self.criterion != criterion:  # every domain brings what it needs, or none does
            raise StateError(
                f"{where} was made with prune.criterion {self.criterion}: "
                "put that back in params.yaml, or start a new lineage under another model.name"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Version:
    schema: str


class StateReader:
    """Reads a state folder; every shard is checked against the manifest when it is read.

    Raises:
        StateError: the manifest or a shard is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = _read_manifest(folder)

    def has_sum(self, index: int | None) -> bool:
        """Whether the sum of block `index`, or of the Fisher information (None), is there.

        It may have been dropped, for contributions give it again.
        """
        return (self.folder / f"sum/{_FISHER if index is None else _shard_name(index)}").is_file()

    def sum(self, index: int, device: torch.device) -> dict[str, Moment]:
        """Moments of block `index` over every domain, by group."""
        file = f"sum/{_shard_name(index)}"
        return as_moments(self._shard(file, self.manifest.sum_shards, device))

    def contribution(self, index: int, entry: DomainEntry, device: torch.device) -> dict[str, Moment]:
        """Moments of block `index` of this version's own domain, which another manifest names as `entry`."""
        file = f"contribution/{_shard_name(index)}"
        return as_moments(self._shard(file, entry.shards, device))

    def fisher_sum(self, device: torch.device) -> dict[str, Tensor]:
        """The Fisher information of every linear over every domain, by its name in the model."""
        return self._shard(f"sum/{_FISHER}", self.manifest.sum_shards, device)

    def fisher(self, entry: DomainEntry, device: torch.device) -> dict[str, Tensor]:
        """The Fisher information of this version's own domain, which another manifest names as `entry`."""
        return self._shard(f"contribution/{_FISHER}", entry.shards, device)

    def _shard(self, file: str, digests: Mapping[str, str], device: torch.device) -> dict[str, Tensor]:
        path = self.folder / file
        try:
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() != digests.get(file):
                raise StateError(f"{path} is damaged: its SHA-256 is not the one in the manifest")
            tensors = safetensors.torch.load(data)
        except (OSError, SafetensorError) as error:
            raise StateError(f"{path} cannot be read: {error}") from error
        return {name: tensor.to(device) for name, tensor in tensors.items()}


class StateWriter:
    """Writes a state folder block by block; without its manifest, written last, a folder is no state."""

    def __init__(self, folder: Path, compact: int | None = None, *, device: torch.device, writes: bool = True) -> None:
        """
        Args:
            device: where what is read again goes.
            compact: bytes that a block's contribution may take in compact storage; None: full storage.
            writes: False only tells how a later step will read what is not written (see `copal.processes`).
        """
        self._folder, self._compact, self._device, self._writes = folder, compact, device, writes
        self._digests: dict[str, dict[str, str]] = {"contribution": {}, "sum": {}}
        self._adopted: set[str] = set()
        for part in self._digests if writes else ():
            (folder / part).mkdir(parents=True, exist_ok=True)

    def contribution(self, index: int, moments: Moments, shapes: Shapes) -> dict[str, Moment]:
        """Write the new domain's moments of block `index`; returns them as a later step will read them."""
        tensors = contribution_tensors(moments, shapes, self._compact)
        self._write("contribution", _shard_name(index), tensors)
        return as_moments(tensors)

    def sum(self, index: int, moments: Moments) -> None:
        """Write the moments of block `index` over every domain."""
        tensors = {}
        for group, moment in moments.items():
            tensors[f"{group}:diagonal"] = moment.total.diagonal()
            tensors[f"{group}:folded"] = fold(moment.total)
            tensors |= _shared_tensors(group, moment, torch.float32)
        self._write("sum", _shard_name(index), tensors)

    def fisher(self, new: Fisher | None, total: Fisher) -> None:
        """Write the Fisher information of the new domain, if any, and over every domain."""
        for part, fisher in (("contribution", new), ("sum", total)):
            if fisher is not None:
                self._write(part, _FISHER, dict(fisher))

    def written(self, index: int | None) -> dict[str, str]:
        """The files of block `index`, or of the Fisher information (None), and their SHA-256."""
        name = _FISHER if index is None else _shard_name(index)
        return {
            file: digest for part in self._digests.values() for file, digest in part.items() if Path(file).name == name
        }

    def adopt(self, written: Mapping[str, str]) -> None:
        """Take files that are there for ones that this writer wrote; one that is read again is hashed first."""
        self._adopted |= written.keys()
        for file, digest in written.items():
            self._digests[file.partition("/")[0]][file] = digest

    def read_contribution(self, index: int) -> dict[str, Moment]:
        """What `contribution` has written of block `index`."""
        return as_moments(self._read("contribution", index))

    def read_sum(self, index: int) -> dict[str, Tensor]:
        """What `sum` has written of block `index`, as it is stored: `as_moments` reads it."""
        return self._read("sum", index)

    def finish(
        self, *, base: str, statistics: str, criterion: str, own: DomainEntry | None, others: Iterable[DomainEntry]
    ) -> Manifest:
        """Write the manifest; `own` is the domain of this state's contribution, if any (its shards are filled in)."""
        entries = [replace(own, shards=self._digests["contribution"])] if own else []
        domains = tuple(sorted((*entries, *others), key=lambda domain: domain.name))
        manifest = Manifest(
            base=base, statistics=statistics, criterion=criterion, domains=domains, sum_shards=self._digests["sum"]
        )
        if self._writes:
            write_json(self._folder / "manifest.json", {"schema": SCHEMA, **asdict(manifest)})
        return manifest

    def _read(self, part: str, index: int) -> dict[str, Tensor]:
        file = f"{part}/{_shard_name(index)}"
        path = self._folder / file
        if file in self._adopted and sha256_file(path) != self._digests[part][file]:
            raise StateError(f"{path}, which a killed step left, is damaged: the step begins anew when it is run again")
        tensors = safetensors.torch.load_file(path)
        return {name: tensor.to(self._device) for name, tensor in tensors.items()}

    def _write(self, part: str, name: str, tensors: dict[str, Tensor]) -> None:
        if not self._writes:
            return
        file = f"{part}/{name}"
        on_cpu = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_shard(self._folder / file, on_cpu)
        self._digests[part][file] = sha256_file(self._folder / file)


def merge_blocks(parts: Iterable[Moments]) -> dict[str, Moment]:
    """Merge the moments of one block from several domains, group by group, in the order given."""
    return reduce(lambda one, other: {group: merge(one[group], other[group]) for group in one}, map(dict, parts))


def contribution_tensors(moments: Moments, shapes: Shapes, compact: int | None) -> dict[str, Tensor]:
    """What a contribution stores of a block. `compact`: the bytes it may take; None: full storage."""
    rank = None if compact is None else ranks(shapes, compact)
    tensors = {}
    for group, moment in moments.items():
        if rank is None:
            tensors[f"{group}:diagonal"], tensors[f"{group}:correlations"] = pack(moment.total)
        else:
            packed = pack_low_rank(moment.total, rank[group])
            tensors |= zip((f"{group}:diagonal", f"{group}:codes", f"{group}:step"), packed, strict=True)
        tensors |= _shared_tensors(group, moment, torch.bfloat16)
    return tensors


def _shard_name(index: int) -> str:
    return f"block-{index:05d}.safetensors"


def _shared_tensors(group: str, moment: Moment, gradient: torch.dtype) -> dict[str, Tensor]:
    """What contributions and sums store alike."""
    tensors = {f"{group}:gradient:{linear}": total.to(gradient) for linear, total in moment.gradient_total.items()}
    return {f"{group}:weight": torch.tensor(moment.weight, dtype=torch.float64), **tensors}


def as_moments(tensors: Mapping[str, Tensor]) -> dict[str, Moment]:
    """The moments of one block from what is stored of them, in a sum or in a contribution of either storage."""
    moments = {}
    for group in dict.fromkeys(name.split(":")[0] for name in tensors):
        diagonal, prefix = tensors[f"{group}:diagonal"], f"{group}:gradient:"
        if f"{group}:folded" in tensors:
            total = unfold(tensors[f"{group}:folded"], diagonal)
        elif f"{group}:codes" in tensors:
            total = unpack_low_rank(diagonal, tensors[f"{group}:codes"], tensors[f"{group}:step"])
        else:
            total = unpack(diagonal, tensors[f"{group}:correlations"])
        gradient = {name.removeprefix(prefix): tensors[name].float() for name in tensors if name.startswith(prefix)}
        moments[group] = Moment(total, tensors[f"{group}:weight"].item(), gradient)
    return moments


def _read_manifest(folder: Path) -> Manifest:
    path = folder / "manifest.json"
    if read_typed(_Version, path, StateError).schema != SCHEMA:
        raise StateError(f"{path} is not of schema {SCHEMA}: another version of copal wrote it")
    return read_typed(Manifest, path, StateError)
