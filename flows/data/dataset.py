"""A dataset version: which data a commit names for a domain."""

from __future__ import annotations

from dataclasses import dataclass

from copal.errors import CopalError, DataError

__all__ = [
    "DatasetError",
    "DatasetVersion",
    "MissingDataError",
    "UnusableDataError",
]


class DatasetError(CopalError):
    """A repository, a revision or a dataset version cannot be used as it is."""


class MissingDataError(DatasetError):
    """A pointer names data that is neither in the cache nor on a remote."""


class UnusableDataError(DataError):
    """The data that a step adds cannot be used: the same data is refused again, as long as settings stay the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetVersion:
    """One version of a domain's data.

    Attributes:
        domain: name of the folder, as it is; the caller checks whether it may name a domain.
        path: of the folder in the repository, `data/<domain>`.
        md5: DVC's hash of the folder, `<32 hexadecimal digits>.dir`.
        git_rev: full SHA of the commit in which the pointer last changed to this md5.
        repository: URL of `origin`, without password; without an origin the absolute path.
    """

    domain: str
    path: str
    md5: str
    git_rev: str
    repository: str
