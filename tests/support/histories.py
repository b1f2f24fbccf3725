"""Histories made by hand, with valid records: what the terminal, the page and the auditor's answers are tested on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from flows.lineage.entries import next_entry
from flows.lineage.record import DomainRecord, build_record, record_digest

ADA = {"role": None, "user": "ada", "host": "host"}
SETTINGS = {"prune": {"sparsity": 0.5, "rounds": [0.6, 1.0]}, "calibration": {"windows": 24}}


def md5(domain: str, data: int = 1) -> str:
    """Of data version `data` of a domain."""
    return hashlib.md5(f"{domain}/{data}".encode()).hexdigest() + ".dir"


def a_history(steps: Sequence[Mapping[str, Any]], model: str = "tiny") -> dict[str, Any]:
    """A dense base as version 1 and a version a step.

    A step: {add: domain, data: 1, perplexity: {domain: value}} or {withdraw: domain, perplexity}; and where wanted
    dense, tokens (of the evaluation; other tokens, another digest), layers, settings, libraries, aliases, repository.
    """
    versions: list[dict[str, Any]] = []
    domains: dict[str, DomainRecord] = {}
    withdrawn: list[dict[str, str]] = []
    for number, step in enumerate([{}, *steps], start=1):
        parent = versions[-1] if versions else None
        domains = {
            name: _older(domain, number - 1, step.get("tokens", {}).get(name)) for name, domain in domains.items()
        }
        added = None
        if "add" in step:
            name, data = step["add"], step.get("data", 1)
            added = domains[name] = DomainRecord(
                name=name,
                path=f"data/{name}",
                dvc_md5=md5(name, data),
                git_rev=hashlib.sha1(f"{name}/{data}".encode()).hexdigest(),
                repository=step.get("repository", "https://git.example/data"),
                weight=1.0,
                tokens=12288,
                windows=24,
                contribution_version=None,
                evaluation_digest=_digest(f"{name}/{data}/{step.get('tokens', {}).get(name)}"),
                evaluation_tokens=8176,
            )
            withdrawn = [gone for gone in withdrawn if gone != {"name": name, "dvc_md5": domains[name].dvc_md5}]
        if "withdraw" in step:
            withdrawn = [*withdrawn, {"name": step["withdraw"], "dvc_md5": domains.pop(step["withdraw"]).dvc_md5}]
        perplexity = step.get("perplexity", {})
        record = build_record(
            model=model,
            parent=None if parent is None else {"version": number - 1, "digest": parent["digest"]},
            base={"fingerprint": "b" * 64, "source": "a folder"},
            key=None if parent is None else _digest(f"key {number}"),
            step=added,
            domains=list(domains.values()),
            withdrawn=withdrawn,
            settings=SETTINGS | step.get("settings", {}),
            settings_fingerprint="f" * 64,
            sparsity={"target": None, "counted": 0.0} if parent is None else {"target": 0.5, "counted": 0.4998},
            weights_back=100 * number if number > 2 else None,
            perplexity=perplexity,
            dense_perplexity={name: step.get("dense", {}).get(name, 6.0) for name in perplexity},
            matrix=[],
            perplexity_before=None,
            backward_transfer=-0.25 if number > 2 else None,
            seconds={"statistics": 1.0, "solve": 2.0, "evaluate": 3.0},
            layers=step.get("layers", []),
            code={"version": "0.1.0", "git_commit": "9" * 40, "dirty": False},
            libraries={"torch": "2.13.0"} | step.get("libraries", {}),
            hardware={"device": "cpu"},
            seeds={"calibration": 0},
            created=f"2026-01-{1 + (number - 1) // 24:02d}T{(number - 1) % 24:02d}:30:00+00:00",
            files={
                "model/config.json": _digest("config"),
                "model/model.safetensors": _digest(f"weights {number}"),
                **({"state/sum/0": _digest(f"sum {number}")} if parent else {}),
            },
        )
        digest = record_digest(record)
        versions.append(
            {
                "version": number,
                "parent": None if parent is None else number - 1,
                "aliases": list(step.get("aliases", [])),
                "tags": {"copal.lineage_digest": digest},
                "digest": digest,
                "record": record,
            }
        )
    versions[-1]["aliases"].append("latest")
    return {"model": model, "versions": versions, "log": []}


def log(history: dict[str, Any], kind: str, when: str, **more: Any) -> None:
    """Append an entry of that time to the history's log."""
    entry = next_entry(history["log"], kind=kind, who=ADA, details=more.pop("details", {"alias": "champion"}), **more)
    history["log"].append(entry | {"when": when})


def gates(history: dict[str, Any], version: int, **passed: bool) -> None:
    """Gate results of a version, by name."""
    results = [
        {"name": name, "passed": good, "value": 0.5, "limit": 0.4, "detail": f"{name} of version {version}"}
        for name, good in passed.items()
    ]
    details = {"record": history["versions"][version - 1]["digest"], "passed": all(passed.values()), "gates": results}
    log(history, "gates", "2026-02-01T00:00:00+00:00", version=version, details=details)


def layers(blocks: int = 4, scale: float = 1.0, first: bool = False) -> list[dict[str, Any]]:
    """Two linears a block, the errors rising with depth."""
    return [
        {
            "name": f"model.layers.{block}.{name}",
            "sparsity": 0.5,
            "layer_error_before": None if first else 0.02 * scale * (block + 1),
            "layer_error_after": 0.01 * scale * (block + 1),
            "response_shift": None if first else 1.2 + 0.1 * block,
            "weights_back": None if first else 40 + block,
            "damping": 0.1,
            "tokens": 12288,
        }
        for block in range(blocks)
        for name in ("self_attn.q_proj", "mlp.down_proj")
    ]


def three_domains() -> dict[str, Any]:
    """legal, code, then other data for legal, then med; code is withdrawn at last. Versions 1 to 6."""
    history = a_history(
        [
            {"add": "legal", "perplexity": {"legal": 20.0}, "layers": layers(first=True)},
            {"add": "code", "perplexity": {"legal": 22.0, "code": 8.0}, "layers": layers()},
            {"add": "legal", "data": 2, "perplexity": {"legal": 10.0, "code": 8.4}, "layers": layers(scale=2.0)},
            {
                "add": "med",
                "perplexity": {"legal": 13.0, "code": 8.2, "med": 7.0},
                "aliases": ["champion"],
                "settings": {"calibration": {"windows": 32}},
                "libraries": {"torch": "2.14.0"},
                "layers": layers(),
            },
            {"withdraw": "code", "perplexity": {"legal": 11.0, "med": 6.9}, "aliases": ["challenger"]},
        ]
    )
    log(history, "promotion", "2026-03-01T09:00:00+00:00", to_version=2, why="first")
    log(history, "promotion", "2026-03-05T09:00:00+00:00", from_version=2, to_version=4)
    log(history, "rollback", "2026-03-05T12:00:00+00:00", from_version=4, to_version=2, why="legal is bad")
    log(history, "promotion", "2026-04-01T09:00:00+00:00", from_version=2, to_version=5)
    gone = {"domain": "code", "dvc_md5": md5("code")}
    log(history, "withdrawal", "2026-04-02T09:00:00+00:00", version=6, why="licence", details=gone)
    gates(history, 5, forgetting=True, sparsity=True)
    gates(history, 6, forgetting=False, sparsity=True)
    return history


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _older(domain: DomainRecord, number: int, tokens: str | None) -> DomainRecord:
    from dataclasses import replace

    made = number if domain.contribution_version is None else domain.contribution_version
    digest = domain.evaluation_digest if tokens is None else _digest(f"{domain.name}/{tokens}")
    return replace(domain, contribution_version=made, evaluation_digest=digest)
