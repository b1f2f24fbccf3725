"""Figures of a lineage for Prometheus: what waits, who works, how the newest version is.

Each is a gauge with the label `model`, computed when it is asked for.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily

from copal.errors import CopalError
from flows.data.commits import committed_at
from flows.data.repositories import data_root
from flows.ledger import LINEAGE
from flows.pending.plan import plan
from flows.project import open_project

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flows.data.dataset import DatasetVersion
    from flows.lineage.record import Record
    from flows.project import Project

__all__ = ["exposition", "registry_of"]


class _Figures:
    """What prometheus_client asks at each scrape."""

    def __init__(self, workspace: str) -> None:
        self._workspace = workspace

    def collect(self) -> Iterator[GaugeMetricFamily]:
        began = time.monotonic()
        model, found = "", list[GaugeMetricFamily]()
        with suppress(CopalError):  # a store is away: that is a figure too, and an alert
            project = open_project(self._workspace)
            model = project.name
            found = list(_figures(project))
        yield from found
        yield _gauge("up", "Whether the stores answered.", model, float(bool(found)))
        yield _gauge("scrape_seconds", "What it took to ask the stores.", model, time.monotonic() - began)


def registry_of(workspace: str) -> CollectorRegistry:
    """What prometheus_client serves: the figures of the lineage in a workspace (a folder or a URL), asked anew at each
    scrape.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Figures(workspace))
    return registry


def exposition(workspace: str) -> str:
    """The figures in Prometheus's text format."""
    return generate_latest(registry_of(workspace)).decode()


def _figures(project: Project) -> Iterable[GaugeMetricFamily]:
    model, found = project.name, plan(project)
    for name, versions in (
        ("pending", found.pending),
        ("waiting", [version for version, _ in found.waiting]),
        ("refused", [version for version, _ in found.refused]),
    ):
        yield _gauge(f"{name}_datasets", f"Dataset versions that are {name}.", model, float(len(versions)))
    yield _gauge(
        "oldest_pending_seconds",
        "Since the oldest dataset version that is pending was committed; 0 where none is.",
        model,
        _age(project, found.pending),
    )
    holder = project.ledger.holder(LINEAGE)
    busy = holder is not None and not holder.over
    yield _gauge("lease_held", "Whether somebody works on the lineage.", model, float(busy))
    left = holder.left if holder is not None and busy else 0.0
    yield _gauge("lease_left_seconds", "Until whoever works on the lineage may be taken over.", model, left)
    head = found.head
    if head is None:
        return
    record = project.registry.record(head)
    yield _gauge("version", "The newest version.", model, float(head.number))
    failed = {None: -1.0, "passed": 0.0, "failed": 1.0}[head.gates]
    yield _gauge("gates_failed", "Whether a gate of the newest version failed; -1: none ran.", model, failed)
    yield from _of_record(model, record)


def _of_record(model: str, record: Record) -> Iterable[GaugeMetricFamily]:
    seconds = record.seconds.as_json()
    yield _gauges("step_seconds", "What the stages of the newest version's step took.", model, "stage", seconds)
    yield _gauge("sparsity", "Share of zeros in the pruned linears.", model, record.sparsity.counted)
    for name, values in (("perplexity", record.perplexity), ("dense_perplexity", record.dense_perplexity)):
        yield _gauges(name, "Of the newest version's domains.", model, "domain", values)


def _age(project: Project, pending: tuple[DatasetVersion, ...]) -> float:
    if not pending:
        return 0.0
    root = data_root(project.workspace, project.settings.watch, pending[0].git_rev)
    committed = [committed_at(root, version.git_rev) for version in pending]
    return max((datetime.now(UTC) - min(committed)).total_seconds(), 0.0)


def _gauge(name: str, what: str, model: str, value: float) -> GaugeMetricFamily:
    gauge = GaugeMetricFamily(f"copal_{name}", what, labels=("model",))
    gauge.add_metric([model], value)
    return gauge


def _gauges(name: str, what: str, model: str, label: str, values: Mapping[str, float]) -> GaugeMetricFamily:
    gauge = GaugeMetricFamily(f"copal_{name}", what, labels=("model", label))
    for key, value in values.items():
        gauge.add_metric([model, key], value)
    return gauge
