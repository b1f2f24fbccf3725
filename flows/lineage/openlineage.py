"""The lineage as OpenLineage run events, for catalogs that read them (https://openlineage.io). Pure.

A step is a run: it reads the domains in its version's state and the parent, and writes the model. Its id is made of the
step's key (of the root, its record's digest), so that what is told while it runs and what is exported later name the
same run.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from flows.lineage.history import History, step_texts
from flows.lineage.record import Domain, Record

__all__ = ["Attempt", "Source", "attempt_event", "events", "source_of", "version_events"]

_SPEC = "https://openlineage.io/spec/2-0-2/OpenLineage.json#/$defs/RunEvent"
_FACET = "https://openlineage.io/spec/facets"
_NAMESPACE = "copal"


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Data that a run reads: where it is, and which version of it."""

    repository: str
    path: str
    md5: str


def source_of(domain: Domain) -> Source:
    """The data of a domain of a record."""
    return Source(repository=domain.repository, path=domain.path, md5=domain.dvc_md5)


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """A step that has not made its version yet, and may never.

    Attributes:
        model: the lineage.
        key: of the step.
        what: it does, in words.
        code: the version of copal.
        parent: number of the version that it builds on, and the digest of its record.
        sources: the data that it reads.
    """

    model: str
    key: str
    what: str
    code: str
    parent: tuple[int, str]
    sources: tuple[Source, ...]


def attempt_event(kind: str, when: datetime, attempt: Attempt, error: str | None = None) -> dict[str, Any]:
    """An event of a step that runs: START, FAIL or ABORT.

    Args:
        when: it happened; with a time zone.
        error: what went wrong.
    """
    producer = _producer(attempt.code)
    facets = {}
    if error is not None:
        facets["errorMessage"] = _facet(
            producer, "1-0-1/ErrorMessageRunFacet", message=error, programmingLanguage="python"
        )
    inputs = [_data(source, producer) for source in attempt.sources]
    inputs.append(_model(attempt.model, *attempt.parent, producer))
    run = {"runId": _run_id(attempt.model, attempt.key), "facets": facets}
    return _event(kind, when, run, attempt.model, attempt.what, inputs, [], producer)


def events(history: History) -> list[dict[str, Any]]:
    """A START and a COMPLETE event for each version, oldest first."""
    steps = step_texts(history)
    return [
        event
        for version in history.versions
        for event in version_events(history.model, version.number, version.record, steps[version.number])
    ]


def version_events(model: str, number: int, record: Record, what: str) -> Iterable[dict[str, Any]]:
    """The START and the COMPLETE event of a version.

    Args:
        what: the step did, in words.
    """
    producer = _producer(record.code.version)
    ended = datetime.fromisoformat(record.created)
    began = ended - timedelta(seconds=record.seconds.total)
    inputs = [_data(source_of(domain), producer) for domain in record.domains]
    if record.parent is not None:
        inputs.append(_model(model, record.parent.version, record.parent.digest, producer))
    run = {"runId": _run_id(model, record.key or record.digest), "facets": {}}
    text, made = f"version {number}: {what}", _model(model, number, record.digest, producer)
    yield _event("START", began, run, model, text, inputs, [], producer)
    yield _event("COMPLETE", ended, run, model, text, inputs, [made], producer)


def _event(
    kind: str,
    when: datetime,
    run: dict[str, Any],
    model: str,
    what: str,
    inputs: list[dict[str, Any]],
    outputs: list[dict[str, Any]],
    producer: str,
) -> dict[str, Any]:
    documentation = _facet(producer, "1-1-0/DocumentationJobFacet", description=what)
    return {
        "eventType": kind,
        "eventTime": when.isoformat(),
        "run": run,
        "job": {"namespace": _NAMESPACE, "name": f"{model}.adapt", "facets": {"documentation": documentation}},
        "inputs": inputs,
        "outputs": outputs,
        "producer": producer,
        "schemaURL": _SPEC,
    }


def _producer(code: str) -> str:
    return f"urn:copal:{quote(code, safe='')}"


def _run_id(model: str, named_by: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"urn:copal:step:{model}:{named_by}"))


def _data(source: Source, producer: str) -> dict[str, Any]:
    uri = _uri(source.repository)
    return {
        "namespace": uri,
        "name": source.path,
        "facets": {
            "version": _facet(producer, "1-0-1/DatasetVersionDatasetFacet", datasetVersion=source.md5),
            "dataSource": _facet(producer, "1-0-1/DatasourceDatasetFacet", name=source.repository, uri=uri),
        },
    }


def _model(name: str, version: int, digest: str, producer: str) -> dict[str, Any]:
    return {
        "namespace": _NAMESPACE,
        "name": name,
        "facets": {
            "version": _facet(producer, "1-0-1/DatasetVersionDatasetFacet", datasetVersion=str(version)),
            "documentation": _facet(
                producer, "1-1-0/DocumentationDatasetFacet", description=f"SHA-256 of its record: {digest}"
            ),
        },
    }


def _facet(producer: str, schema: str, **values: str) -> dict[str, str]:
    return {"_producer": producer, "_schemaURL": f"{_FACET}/{schema}.json#/$defs/{schema.split('/')[1]}", **values}


def _uri(repository: str) -> str:
    """A repository as a URI: also a folder of this machine, and git's short form user@host:path."""
    if urlsplit(repository).scheme in ("https", "http", "ssh", "git", "file"):
        return quote(repository, safe=":/?#[]@!$&'()*+,;=%")
    if Path(repository).is_absolute():
        return Path(repository).as_uri()
    host, colon, path = repository.partition(":")
    return f"ssh://{quote(host, safe='@')}/{quote(path)}" if colon else f"urn:copal:repository:{quote(repository)}"
