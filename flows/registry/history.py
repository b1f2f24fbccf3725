"""The history of a lineage, read from the registry once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flows.lineage.record import record_digest

if TYPE_CHECKING:
    from flows.registry.registry import Registry

__all__ = ["read_history"]


def read_history(registry: Registry) -> dict[str, Any]:
    """The history of the registry's model, as plain JSON values.

    Raises:
        LineageError: a record or the log is damaged or was altered.
        RegistryError: the registry cannot be read.
    """
    versions = []
    for version in registry.versions():
        record = registry.record(version)
        versions.append(
            {
                "version": version.number,
                "parent": version.parent,
                "aliases": list(version.aliases),
                "tags": dict(version.tags),
                "digest": record_digest(record),
                "record": record,
                "signature": version.tags.get("copal.signature"),
            }
        )
    return {"model": registry.model_name, "versions": versions, "log": registry.log()}
