"""OpenLineage events of a step, as they happen, to the catalog that `OPENLINEAGE_URL` names."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast

from copal.errors import one_line
from flows.lineage.openlineage import Attempt, Source, attempt_event, source_of, version_events
from flows.machine import code_version
from flows.project import Project
from flows.step.resolve import Step
from flows.uris import without_secrets

if TYPE_CHECKING:
    from flows.registry.versions import ModelVersion

__all__ = ["lineage_events"]

_log = logging.getLogger(__name__)

_URL = "OPENLINEAGE_URL"


@contextmanager
def lineage_events(project: Project, step: Step) -> Iterator[Callable[[ModelVersion], None]]:
    """Tell that a step starts, and how it ends: that it fails, or, by a call of what this gives, which version it made.

    A catalog that does not answer keeps no step from going on: that is a line in the log. Nothing is told where
    `OPENLINEAGE_URL` is not set; its client (the extra `openlineage`) reads the other variables of its documentation, a
    key for one.
    """
    if not os.environ.get(_URL):
        yield lambda version: None
        return
    attempt = _attempt(project, step)
    _emit(attempt_event("START", datetime.now(UTC), attempt))
    try:
        yield lambda version: _emit(_completed(project, version, attempt.what))
    except Exception as error:
        said = without_secrets(one_line(error))
        _emit(attempt_event("FAIL", datetime.now(UTC), attempt, said))
        raise
    except BaseException:
        _emit(attempt_event("ABORT", datetime.now(UTC), attempt))
        raise


def _attempt(project: Project, step: Step) -> Attempt:
    data, head = step.version, project.registry.version(step.head)
    new = () if step.withdraws else (Source(repository=data.repository, path=data.path, md5=data.md5),)
    return Attempt(
        model=project.name,
        key=step.key,
        what=f"{'without ' if step.withdraws else ''}{data.domain}",
        code=code_version()["version"],
        parent=(head.number, head.digest),
        sources=(*map(source_of, step.earlier), *new),
    )


def _completed(project: Project, version: ModelVersion, what: str) -> dict[str, Any]:
    *_, completed = version_events(project.name, version.number, project.registry.record(version), what)
    return completed


def _emit(event: dict[str, Any]) -> None:
    try:
        from openlineage.client import OpenLineageClient
        from openlineage.client.transport.http import HttpTransport
    except ImportError:
        _log.warning("%s is set, but its client is not installed: pip install 'copal[openlineage]'", _URL)
        return
    try:
        transport = OpenLineageClient().transport
        if isinstance(transport, HttpTransport):  # by itself it tries for ten seconds, and a step waits meanwhile
            transport.config.retry = {**transport.config.retry, "total": 1, "read": 1, "connect": 1}
        transport.emit(cast("Any", event))  # the specification's JSON will do as well as a class
    except Exception as error:  # noqa: BLE001  whatever a transport raises, the step goes on
        _log.warning(
            "the catalog at %s was not told: %s", without_secrets(os.environ[_URL]), without_secrets(str(error))
        )
