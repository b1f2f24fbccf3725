"""Registries on a real MLflow database, and what is published in them: folders of a few bytes with valid records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flows.cache import Cache
from flows.lineage.files import file_digests
from flows.lineage.keys import step_key
from flows.lineage.record import Base, Code, Domain, Parent, Record, Seconds, Sparsity
from flows.registry.registry import Registry
from flows.registry.store import Places
from flows.registry.versions import ModelVersion
from support.histories import a_domain

BASE = "b" * 64


def a_registry(workspace: Path, name: str = "tiny") -> Registry:
    return Registry(places_in(workspace), name, Cache(workspace / "cache"))


def places_in(folder: Path) -> Places:
    return Places(f"sqlite:///{folder}/mlflow.db", folder / "artifacts", (folder / "artifacts").as_uri())


def staged(folder: Path, text: str) -> Path:
    """A model folder of a few bytes."""
    for name in ("model/config.json", "model/model.safetensors", "state/manifest.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name} {text}")
    (folder / "report.md").write_text("a report")
    return folder


def a_record(folder: Path, parent: ModelVersion | None, domains: list[str], **changes: Any) -> Record:
    """The record of `folder`: the step that adds the last of `domains`."""
    step = _domain(domains[-1]) if domains else None
    values: dict[str, Any] = {
        "model": "tiny",
        "parent": None if parent is None else Parent(version=parent.number, digest=parent.tags["copal.lineage_digest"]),
        "base": Base(fingerprint=BASE, source="a folder"),
        "key": None if parent is None or step is None else step_key(parent.number, step.name, step.dvc_md5, "f" * 64),
        "step": step,
        "domains": tuple(_domain(name) for name in sorted(domains)),
        "withdrawn": (),
        "settings": {"prune": {"sparsity": 0.5, "rounds": [0.6, 1.0], "criterion": "output"}},
        "settings_fingerprint": "f" * 64,
        "sparsity": Sparsity(target=0.5 if domains else None, counted=0.4998 if domains else 0.0),
        "weights_back": 7 if len(domains) > 1 else None,
        "perplexity": {name: 8.0 + i for i, name in enumerate(domains)},
        "dense_perplexity": dict.fromkeys(domains, 6.0),
        "matrix": (),
        "perplexity_before": None,
        "backward_transfer": -0.25 if len(domains) > 1 else None,
        "seconds": Seconds(statistics=1.0, solve=2.0, evaluate=3.0),
        "layers": (),
        "code": Code(version="0.1.0", git_commit="9" * 40, dirty=False),
        "libraries": {"torch": "2.13.0"},
        "hardware": {"device": "cpu"},
        "seeds": {"calibration": 0},
        "created": "2026-01-02T03:04:05+00:00",
        "files": file_digests(folder / "model", folder) | file_digests(folder / "state", folder),
        **changes,
    }
    return Record(**values)


def _domain(name: str) -> Domain:
    return a_domain(name).model_copy(update={"dvc_md5": name[0] * 32 + ".dir"})
