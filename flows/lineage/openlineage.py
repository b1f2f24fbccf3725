"""The lineage as OpenLineage run events, for catalogs that read them (https://openlineage.io). Pure.

A version is a run: it reads the domains in its state and its parent, and writes the model. Its id is made of the
digest of its record, so that an export made again names the same runs.
"""

from __future__ import annotations

import uuid
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from flows.lineage.history import History, step_texts
from flows.lineage.record import Domain

__all__ = ["events"]

_SPEC = "https://openlineage.io/spec/2-0-2/OpenLineage.json#/$defs/RunEvent"
_FACET = "https://openlineage.io/spec/facets"
_NAMESPACE = "copal"


def events(history: History) -> list[dict[str, Any]]:
    """A START and a COMPLETE event for each version, oldest first."""
    found = []
    steps = step_texts(history)
    for version in history.versions:
        record = version.record
        producer = f"urn:copal:{quote(record.code.version, safe='')}"
        ended = datetime.fromisoformat(record.created)
        began = ended - timedelta(seconds=record.seconds.total)
        inputs = [_data(domain, producer) for domain in record.domains]
        if record.parent is not None:
            inputs.append(_model(history.model, record.parent.version, record.parent.digest, producer))
        made = _model(history.model, version.number, version.digest, producer)
        for kind, when in (("START", began), ("COMPLETE", ended)):
            found.append(
                {
                    "eventType": kind,
                    "eventTime": when.isoformat(),
                    "run": {"runId": str(uuid.uuid5(uuid.NAMESPACE_URL, f"urn:copal:record:{version.digest}"))},
                    "job": {
                        "namespace": _NAMESPACE,
                        "name": f"{history.model}.adapt",
                        "facets": {
                            "documentation": _facet(
                                producer,
                                "1-1-0/DocumentationJobFacet",
                                description=f"version {version.number}: {steps[version.number]}",
                            )
                        },
                    },
                    "inputs": inputs,
                    "outputs": [made] if kind == "COMPLETE" else [],
                    "producer": producer,
                    "schemaURL": _SPEC,
                }
            )
    return found


def _data(domain: Domain, producer: str) -> dict[str, Any]:
    uri = _uri(domain.repository)
    return {
        "namespace": uri,
        "name": domain.path,
        "facets": {
            "version": _facet(producer, "1-0-1/DatasetVersionDatasetFacet", datasetVersion=domain.dvc_md5),
            "dataSource": _facet(producer, "1-0-1/DatasourceDatasetFacet", name=domain.repository, uri=uri),
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
