"""What a step builds on: the version before it, and what that knows of every domain that stays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from copal.fisher import add_fisher
from copal.sensitivity import Moment
from copal.state import DomainEntry, StateReader, merge_blocks

__all__ = ["Parent", "ParentState"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Parent:
    """The pruned version that a step builds on.

    Attributes:
        version: its number, for the manifest.
        model: its Hugging Face folder.
        state: its state folder.
        states: version -> state folder, of every version that its manifest names; read only when a domain's data is
            replaced or withdrawn, or the parent's sum was dropped.
    """

    version: int
    model: Path
    state: Path
    states: Mapping[int, Path]

    @classmethod
    def from_step(cls, out: Path, version: int, parent: Parent | None) -> Self:
        """The version that `prune_step` wrote to the folder `out`, itself built on `parent`; you choose its number."""
        states = {**parent.states, parent.version: parent.state} if parent else {}
        return cls(version=version, model=out / "model", state=out / "state", states=states)


class ParentState:
    """The parent's statistics without the domain that the step brings or takes out.

    Attributes:
        folder: the parent's state.
        manifest: of that state, the step's own domain still in it.
        others: the domains that stay, each with the version whose state holds its contribution.
        replaces: whether the parent knows the step's domain.
    """

    def __init__(self, parent: Parent, domain: str) -> None:
        self._reader = StateReader(parent.state)
        self.folder, self.manifest = parent.state, self._reader.manifest
        self.others = tuple(
            replace(entry, version=parent.version if entry.version is None else entry.version)
            for entry in self.manifest.domains
            if entry.name != domain
        )
        self.replaces = len(self.others) < len(self.manifest.domains)
        self._states = {**parent.states, parent.version: parent.state}
        self._readers: dict[int, StateReader] = {}

    def moments(self, index: int, device: torch.device) -> dict[str, Moment] | None:
        """Of block `index`, over the domains that stay: group -> moment; None where no domain stays.

        The stored sum, or a new one where the step's domain is in that or the stored one was dropped. Contributions
        are added in the order in which they came, as steps add them: a new sum is the same to the last bit.
        """
        if not self.replaces and self._reader.has_sum(index):
            return self._reader.sum(index, device)
        parts = [reader.contribution(index, entry, device) for reader, entry in self._contributions()]
        return merge_blocks(parts) if parts else None

    def fisher(self, device: torch.device) -> dict[str, Tensor] | None:
        """The Fisher information of every linear over the domains that stay, likewise (criterion `loss` only)."""
        if not self.replaces and self._reader.has_sum(None):
            return self._reader.fisher_sum(device)
        parts = [reader.fisher(entry, device) for reader, entry in self._contributions()]
        return add_fisher(parts) if parts else None

    def _contributions(self) -> Iterator[tuple[StateReader, DomainEntry]]:
        """The state that holds each of the domains that stay, in the order in which they came."""
        held = {entry.version: entry for entry in self.others if entry.version is not None}
        for version in sorted(held):
            if version not in self._readers:
                self._readers[version] = StateReader(self._states[version])
            yield self._readers[version], held[version]
