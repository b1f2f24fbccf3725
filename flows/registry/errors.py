"""What can go wrong with the registry.

CopalError
  RegistryError             the store cannot be opened, or refuses what it was asked for
    HeadMovedError          another version came first
    AliasMovedError         somebody else moved an alias
    LineageConflictError    another base or sparsity under the same model name
"""

from __future__ import annotations

from copal.errors import CopalError

__all__ = ["AliasMovedError", "HeadMovedError", "LineageConflictError", "RegistryError"]


class RegistryError(CopalError):
    """The model registry cannot be opened, or refuses what it was asked for."""


class HeadMovedError(RegistryError):
    """Another version was registered since the step began; nothing was registered, run the step on the new head."""


class AliasMovedError(RegistryError):
    """An alias does not name the version that it should: somebody else moved it."""


class LineageConflictError(RegistryError):
    """The record belongs to another base model or sparsity pattern than the lineage of this model name."""
