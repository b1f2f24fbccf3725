"""The dataset version that a record names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flows.lineage.record import Domain

if TYPE_CHECKING:
    from flows.data.dataset import DatasetVersion

__all__ = [
    "dataset_of",
]


def dataset_of(entry: Domain) -> DatasetVersion:
    """The dataset version that a record names."""
    from flows.data.dataset import DatasetVersion

    return DatasetVersion(
        domain=entry.name,
        path=entry.path,
        md5=entry.dvc_md5,
        git_rev=entry.git_rev,
        repository=entry.repository,
    )
