"""The history of a lineage, read from the registry once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flows.lineage.history import History, Version

if TYPE_CHECKING:
    from flows.registry.registry import Registry

__all__ = ["read_history"]


def read_history(registry: Registry) -> History:
    """The history of the registry's model.

    Raises:
        LineageError: a record or the log is damaged or was altered.
        RegistryError: the registry cannot be read.
    """
    versions = []
    for version in registry.versions():
        record = registry.record(version)
        versions.append(
            Version(
                number=version.number,
                parent=version.parent,
                aliases=tuple(version.aliases),
                tags=dict(version.tags),
                digest=record.digest,
                record=record,
                signature=version.tags.get("copal.signature"),
            )
        )
    return History(model=registry.model_name, versions=tuple(versions), log=tuple(registry.log()))
