"""The windows of the domains of a version: those of earlier domains as they were, those of a new one beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from copal.errors import DataError
from flows.data.dataset import UnusableDataError
from flows.lineage.record import Domain, LeftOut

if TYPE_CHECKING:
    from copal.calibration import DomainWindows
    from copal.config import CalibrationConfig
    from copal.leakage import OtherText

__all__ = ["cut_windows", "of_domain"]


def cut_windows(
    base: Path,
    data: Mapping[str, str],
    earlier: Sequence[Domain],
    new: str | None,
    left_out: LeftOut | None,
    config: CalibrationConfig,
) -> dict[str, DomainWindows]:
    """Domain -> windows, of the domains in the folders `data`; errors name the user's folder, not the cache's.

    Those of an earlier domain do without the documents that they did without from the beginning, and those of the new
    one without what would leak from one to another.

    Args:
        base: has the tokenizer.
        new: the domain that comes; None: none does.
        left_out: documents that the new one is to do without, where that is known already.

    Raises:
        ModelError: the tokenizer cannot be loaded.
        DataError: see `copal.calibration.domain_windows`; `UnusableDataError` where it is about the new domain.
    """
    from copal.calibration import domain_windows, text_read
    from copal.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(base)

    def cut(name: str, others: OtherText | None, out: LeftOut | None) -> DomainWindows:
        with of_domain(name, new):
            try:
                known = out.as_hashes() if out else None
                return domain_windows(Path(data[name]), tokenizer, config, others=others, left_out=known)
            except DataError as error:
                raise DataError(str(error).replace(data[name], f"data/{name}")) from error

    found = {entry.name: cut(entry.name, None, entry.left_out) for entry in earlier if entry.name in data}
    if new is not None:
        others = text_read(found.values()) if left_out is None else None
        found[new] = cut(new, others, left_out)
    return dict(sorted(found.items()))


@contextmanager
def of_domain(domain: str, new: str | None) -> Iterator[None]:
    """What refuses the data of the domain that a step adds will do so again: it gets a type of its own."""
    try:
        yield
    except DataError as error:
        if domain != new:
            raise
        raise UnusableDataError(str(error)) from error
