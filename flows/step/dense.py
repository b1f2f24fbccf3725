"""Which figures of the dense base a lineage knows: its records are the cache.

A lineage has one base. A record says how that did on each of the version's domains, on which windows (SHA-256) and in
which dtype. It never changes, and its digest stands in the record of its child: a figure that is taken from there has
been checked like the rest of the record, and there is no second place to be altered, or for two workers to write to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from copal.errors import CopalError
from flows.lineage.record import Record
from flows.registry.registry import Registry
from flows.registry.versions import ModelVersion

__all__ = ["known_figures", "known_task_figures"]


def known_figures(registry: Registry, head: ModelVersion, dtype: str) -> dict[str, float]:
    """SHA-256 of evaluation windows -> perplexity of the dense base on them, from a forward pass in `dtype`.

    Of several figures for the same windows, which differ by rounding, the newest. An ancestor whose record cannot be
    read, or is not the one that its child was made of, ends the search: what it and those before it knew is measured
    again.

    Raises:
        LineageError, RegistryError: the record of `head` is damaged or cannot be read.
    """
    dtypes: dict[tuple[str, float], object] = {}
    for record in reversed(list(_ancestry(registry, head))):
        for domain in record.domains:
            if domain.name in record.dense_perplexity:
                figure = domain.evaluation_digest, record.dense_perplexity[domain.name]
                # The first record that has a figure measured it: copal once handed on those of another dtype too.
                dtypes.setdefault(figure, record.hardware.get("dtype"))
    return {digest: perplexity for (digest, perplexity), measured_in in dtypes.items() if measured_in == dtype}


def known_task_figures(registry: Registry, head: ModelVersion, dtype: str) -> dict[str, Mapping[str, float]]:
    """Digest of a task -> figures of the dense base by metric, from a forward pass in `dtype`; see `known_figures`.

    Raises:
        LineageError, RegistryError: the record of `head` is damaged or cannot be read.
    """
    known: dict[str, Mapping[str, float]] = {}
    for record in reversed(list(_ancestry(registry, head))):
        if record.hardware.get("dtype") == dtype:
            known |= {task.digest: task.dense for tasks in record.tasks.values() for task in tasks.values()}
    return known


def _ancestry(registry: Registry, head: ModelVersion) -> Iterator[Record]:
    """The records of a version and of those before it, newest first, as far as the chain of their digests holds."""
    record = registry.record(head)
    yield record
    while (parent := record.parent) is not None:
        try:
            record = registry.record(registry.kept(parent.version))
        except CopalError:
            return
        if record.digest != parent.digest:
            return
        yield record
