"""The record of a model version: which base, data, settings and code made it, and what came out.

A record is a plain JSON object, written once as `lineage.json` beside the weights. Its digest goes into the registry
and into the record of every child, so records form a hash chain: whoever alters one breaks the digests after it. It
does not hold what comes later (gates, aliases, its own version number). Pure: knows of no registry and no data tool.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timedelta
from pathlib import Path, PurePosixPath
from typing import Any

from copal.config import canonical_json, fingerprint
from copal.errors import CopalError
from copal.files import sha256_file, write_atomic

__all__ = [
    "CONTRIBUTION_FOLDER",
    "RECORD_FILE",
    "SCHEMA",
    "SUM_FOLDER",
    "DomainRecord",
    "LineageError",
    "build_record",
    "domain_records",
    "file_digests",
    "read_record",
    "record_digest",
    "step_key",
    "validate",
    "verify_files",
    "withdrawal_key",
    "withdrawal_of",
    "write_record",
]

SCHEMA = "copal.lineage/2"  # 2: withdrawn, matrix; damping and tokens of a layer
RECORD_FILE = "lineage.json"
SUM_FOLDER = "state/sum"  # the part of a version that can be made again, see copal.state
CONTRIBUTION_FOLDER = "state/contribution"  # what a version keeps of its own domain; deleted by a purge alone
_HASHED_FOLDERS = ("model", "state")


class LineageError(CopalError):
    """A lineage record is damaged, altered, of another schema, or was built from unusable values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainRecord:
    """One domain of the sensitivity state, at the data version that the state holds.

    Attributes:
        path: of the data inside `repository`.
        dvc_md5: DVC's md5 of the data (`<md5>.dir` for a folder).
        git_rev: commit of `repository` that tracks `dvc_md5`.
        weight: of the domain in the sum of statistics.
        tokens, windows: what calibration read.
        contribution_version: model version whose state holds the contribution; None: the version of this record.
        evaluation_digest, evaluation_tokens: which tokens the perplexity was measured on (SHA-256), how many predicted.
    """

    name: str
    path: str
    dvc_md5: str
    git_rev: str
    repository: str
    weight: float
    tokens: int
    windows: int
    contribution_version: int | None
    evaluation_digest: str
    evaluation_tokens: int


def build_record(
    *,
    model: str,
    parent: Mapping[str, Any] | None,
    base: Mapping[str, Any],
    key: str | None,
    step: DomainRecord | None,
    domains: Sequence[DomainRecord],
    withdrawn: Sequence[Mapping[str, str]],
    settings: Mapping[str, Any],
    settings_fingerprint: str,
    sparsity: Mapping[str, Any],
    weights_back: int | None,
    perplexity: Mapping[str, float],
    dense_perplexity: Mapping[str, float],
    matrix: Sequence[Mapping[str, Any]],
    perplexity_before: float | None,
    backward_transfer: float | None,
    seconds: Mapping[str, float],
    layers: Sequence[Mapping[str, Any]],
    code: Mapping[str, Any],
    libraries: Mapping[str, str],
    hardware: Mapping[str, Any],
    seeds: Mapping[str, Any],
    created: str,
    files: Mapping[str, str],
) -> dict[str, Any]:
    """The validated record of a version, as plain JSON values.

    Args:
        model: registered model name.
        parent: {version, digest} of the parent; None for the root of the lineage, which has no `key` and `step` either.
        base: {fingerprint, source} of the dense base checkpoint.
        key: `step_key` of the step.
        step: the domain that this step added or replaced; None where it withdrew one. `domains`: every domain in the
            state.
        withdrawn: {name, dvc_md5} of dataset versions that were withdrawn and may not come back by themselves; in a
            record without a step, the last one is what this version withdrew.
        sparsity: {target, counted}; target is a share or a pattern such as "2:4", None where nothing was pruned yet.
        weights_back: weights that were zero in the parent and are not now; None when the parent is the dense root.
        perplexity, dense_perplexity: {domain: value} of this version and of the dense base.
        matrix: {version, perplexity} of every pruned version up to this one, oldest first; the version of the last is
            None: this one.
        perplexity_before: of the new domain on the parent, before the step.
        seconds: {statistics, solve, evaluate}.
        layers: a dict per pruned linear: name, sparsity, layer_error_before, layer_error_after, response_shift,
            damping, tokens (of the new domain that it read).
        code: {version, git_commit, dirty}; libraries: {name: version}.
        created: UTC time in ISO 8601.
        files: {path relative to the version's folder: SHA-256}, see `file_digests`.

    Raises:
        LineageError: a field is missing, of the wrong type, NaN or infinite (the field is named).
    """
    ordered = sorted(domains, key=lambda domain: domain.name)
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "model": model,
        "parent": parent,
        "base": base,
        "key": key,
        "step": None if step is None else asdict(step),
        "domains": [asdict(domain) for domain in ordered],
        "withdrawn": withdrawn,
        "settings": settings,
        "settings_fingerprint": settings_fingerprint,
        "sparsity": sparsity,
        "weights_back": weights_back,
        "perplexity": perplexity,
        "dense_perplexity": dense_perplexity,
        "matrix": matrix,
        "perplexity_before": perplexity_before,
        "backward_transfer": backward_transfer,
        "seconds": seconds,
        "layers": layers,
        "code": code,
        "libraries": libraries,
        "hardware": hardware,
        "seeds": seeds,
        "created": created,
        "files": files,
    }
    for name, value in record.items():
        try:
            record[name] = json.loads(canonical_json(value))  # tuples to lists, and nothing shared with the caller
        except (TypeError, ValueError) as error:
            raise LineageError(f"lineage record: {name} cannot be written as JSON: {error}") from error
    validate(record)
    return record


def validate(record: object, where: str = "lineage record") -> None:
    """Check the structure of a record.

    Raises:
        LineageError: names `where` and the field, and says what the field should be.
    """
    if isinstance(record, dict) and record.get("schema") != SCHEMA:
        raise LineageError(
            f"{where}: schema is {record.get('schema')!r}, this copal reads {SCHEMA!r}; use the copal that wrote it"
        )
    problem = _record_check()(record)
    if problem:
        raise LineageError(f"{where}: {problem.lstrip('. ')}")
    assert isinstance(record, dict)
    names = [domain["name"] for domain in record["domains"]]
    if names != sorted(set(names)):
        raise LineageError(f"{where}: domains must be sorted by name, each name once, not {_shown(names)}")
    if record["step"] is not None and record["step"] not in record["domains"]:
        raise LineageError(f"{where}: step must be one of the domains, and {record['step']['name']!r} is not")
    if set(record["perplexity"]) != set(record["dense_perplexity"]):
        raise LineageError(f"{where}: perplexity and dense_perplexity must name the same domains")
    if record["parent"] is None and (record["key"] is not None or record["step"] is not None):
        raise LineageError(f"{where}: key and step must be null where parent is (the root of a lineage)")
    if record["parent"] is not None and record["key"] is None:
        raise LineageError(f"{where}: key must be there where parent is")
    gone = withdrawal_of(record)
    if record["parent"] is not None and record["step"] is None and (gone is None or gone["name"] in names):
        raise LineageError(f"{where}: without a step, the last of withdrawn must be a domain that is not in domains")


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write `record` as pretty JSON with sorted keys, whole or not at all.

    Raises:
        LineageError: the record is not valid.
    """
    validate(record, str(path))
    text = json.dumps(record, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomic(path, text)


def read_record(path: Path) -> dict[str, Any]:
    """Read a record and check its structure.

    Raises:
        LineageError: no file, no JSON, another schema, or a field that is missing or of the wrong type.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LineageError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # also text that is not UTF-8
        raise LineageError(f"{path}: is not JSON: {error}") from error
    validate(record, str(path))
    return dict(record)


def record_digest(record: Mapping[str, Any]) -> str:
    """SHA-256 (hexadecimal) of the record's canonical JSON: the same before writing and after reading."""
    return fingerprint(record)


def withdrawal_of(record: Mapping[str, Any]) -> dict[str, str] | None:
    """{name, dvc_md5} of the domain that this version withdrew; None where it withdrew none."""
    if record["parent"] is None or record["step"] is not None or not record["withdrawn"]:
        return None
    return dict(record["withdrawn"][-1])


def domain_records(record: Mapping[str, Any], version: int) -> list[DomainRecord]:
    """The domains of the record of model version `version`, ready for the record of a child.

    `contribution_version` None ("this version") becomes `version`.
    """
    found = [DomainRecord(**domain) for domain in record["domains"]]
    return [replace(d, contribution_version=version) if d.contribution_version is None else d for d in found]


def file_digests(folder: Path, relative_to: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder`, by POSIX path relative to `relative_to`; {} where there is no folder.

    For a version's folder: `file_digests(v / "model", v) | file_digests(v / "state", v)`.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(relative_to).as_posix(): sha256_file(path) for path in paths}


def verify_files(
    record: Mapping[str, Any], folder: Path, *, sum_dropped: bool = False, contribution_dropped: bool = False
) -> list[str]:
    """What differs between a version's folder and its record: `missing: F`, `changed: F`, `extra: F`; [] if nothing.

    Extra are files in model/ and state/ that the record does not name; other files beside them are not looked at.
    `sum_dropped`, `contribution_dropped`: that part of the version's state was dropped, so that a file of it may be
    missing, though not changed.
    """
    dropped = [
        *([f"{SUM_FOLDER}/"] if sum_dropped else []),
        *([f"{CONTRIBUTION_FOLDER}/"] if contribution_dropped else []),
    ]
    found: dict[str, str] = {}
    for name in _HASHED_FOLDERS:
        found |= file_digests(folder / name, folder)
    for name in set(record["files"]) - set(found):
        if (folder / name).is_file():
            found[name] = sha256_file(folder / name)
    differences = []
    for name in sorted(set(record["files"]) | set(found)):
        if name not in found:
            if not name.startswith(tuple(dropped)):
                differences.append(f"missing: {name}")
        elif name not in record["files"]:
            differences.append(f"extra: {name}")
        elif found[name] != record["files"][name]:
            differences.append(f"changed: {name}")
    return differences


def step_key(parent_version: int, domain: str, dvc_md5: str, settings_fingerprint: str) -> str:
    """SHA-256 that names a step: the same parent, data and settings give the same key, and never two versions."""
    return fingerprint([parent_version, domain, dvc_md5, settings_fingerprint])


def withdrawal_key(parent_version: int, domain: str, dvc_md5: str, settings_fingerprint: str) -> str:
    """SHA-256 that names the step that takes a domain out; never that of a `step_key`."""
    return fingerprint([parent_version, domain, dvc_md5, settings_fingerprint, "withdrawn"])


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


_Check = Callable[[Any], str | None]  # None where the value is right, else what is wrong, after the name of the field


def _record_check() -> _Check:
    perplexities = _map_of(_number)
    domain = _domain_check()
    layer = _object(
        name=_text,
        sparsity=_number,
        layer_error_before=_or_null(_number),
        layer_error_after=_or_null(_number),
        response_shift=_or_null(_number),
        damping=_or_null(_number),
        tokens=_whole,
    )
    return _object(
        schema=_text,
        model=_text,
        parent=_or_null(_object(version=_whole, digest=_sha256_text)),
        base=_object(fingerprint=_text, source=_text),
        key=_or_null(_sha256_text),
        step=_or_null(domain),
        domains=_list_of(domain),
        withdrawn=_list_of(_object(name=_text, dvc_md5=_text)),
        settings=_plain,
        settings_fingerprint=_text,
        sparsity=_object(target=_or_null(_number_or_text), counted=_number),
        weights_back=_or_null(_whole),
        perplexity=perplexities,
        dense_perplexity=perplexities,
        matrix=_list_of(_object(version=_or_null(_whole), perplexity=perplexities)),
        perplexity_before=_or_null(_number),
        backward_transfer=_or_null(_number),
        seconds=_object(statistics=_number, solve=_number, evaluate=_number),
        layers=_list_of(layer),
        code=_object(version=_text, git_commit=_or_null(_text), dirty=_or_null(_boolean)),
        libraries=_map_of(_text),
        hardware=_plain,
        seeds=_plain,
        created=_utc,
        files=_files,
    )


def _domain_check() -> _Check:
    checks = {"str": _text, "int": _whole, "float": _number, "int | None": _or_null(_whole)}
    return _object(**{field.name: checks[str(field.type)] for field in fields(DomainRecord)})


def _must(be: str, value: Any) -> str:
    return f" must be {be}, not {_shown(value)}"


def _text(value: Any) -> str | None:
    return None if isinstance(value, str) and value else _must("text", value)


def _boolean(value: Any) -> str | None:
    return None if isinstance(value, bool) else _must("true or false", value)


def _whole(value: Any) -> str | None:
    right = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return None if right else _must("a whole number of at least 0", value)


def _number(value: Any) -> str | None:
    right = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return None if right else _must("a finite number", value)


def _number_or_text(value: Any) -> str | None:
    return None if _number(value) is None or _text(value) is None else _must("a share or a pattern", value)


def _sha256_text(value: Any) -> str | None:
    right = isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")
    return None if right else _must("a SHA-256 in hexadecimal", value)


def _utc(value: Any) -> str | None:
    try:
        if isinstance(value, str) and datetime.fromisoformat(value).utcoffset() == timedelta(0):
            return None
    except ValueError:
        pass
    return _must("a UTC time in ISO 8601", value)


def _plain(value: Any) -> str | None:
    try:
        canonical_json(value)
    except (TypeError, ValueError) as error:
        return f" cannot be written as JSON: {error}"
    return None if isinstance(value, dict) else _must("a JSON object", value)


def _files(value: Any) -> str | None:
    problem = _map_of(_sha256_text)(value)
    if problem:
        return problem
    for name in value:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:  # names are joined to a folder when files are verified
            return f" must name files inside the version's folder, not {_shown(name)}"
    return None


def _or_null(check: _Check) -> _Check:
    return lambda value: None if value is None else check(value)


def _list_of(check: _Check) -> _Check:
    def checked(value: Any) -> str | None:
        if not isinstance(value, list):
            return _must("a list", value)
        return next((f"[{i}]{problem}" for i, item in enumerate(value) if (problem := check(item))), None)

    return checked


def _map_of(check: _Check) -> _Check:
    def checked(value: Any) -> str | None:
        if not isinstance(value, dict):
            return _must("a JSON object", value)
        return next((f".{name}{problem}" for name, item in value.items() if (problem := check(item))), None)

    return checked


def _object(**checks: _Check) -> _Check:
    """An object with exactly these fields."""

    def checked(value: Any) -> str | None:
        if not isinstance(value, dict):
            return _must(f"a JSON object with {', '.join(checks)}", value)
        for name in sorted(set(checks) - set(value)):
            return f".{name} is missing"
        for name in sorted(set(value) - set(checks)):
            return f".{name} is not a field of {SCHEMA}"
        return next((f".{name}{problem}" for name, check in checks.items() if (problem := check(value[name]))), None)

    return checked
