"""The record of a model version: which base, data, settings and code made it, and what came out.

A record is a plain JSON object, written once as `lineage.json` beside the weights. Its digest goes into the registry
and into the record of every child, so records form a hash chain: whoever alters one breaks the digests after it. It
does not hold what comes later (gates, aliases, its own version number). Pure: knows of no registry and no data tool.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from copal.config import canonical_json, fingerprint
from copal.errors import CopalError
from copal.files import json_text, sha256_file, write_atomic
from flows.lineage.schema import problem_with, shown

__all__ = [
    "CONTRIBUTION_FOLDER",
    "HASHED_FOLDERS",
    "RECORD_FILE",
    "SCHEMA",
    "SIGNATURE_FILE",
    "SUM_FOLDER",
    "DomainRecord",
    "LineageError",
    "build_record",
    "domain_records",
    "file_differences",
    "file_digests",
    "flatten",
    "read_record",
    "record_digest",
    "step_key",
    "validate",
    "verify_files",
    "version_files",
    "withdrawal_key",
    "withdrawal_of",
    "write_record",
]

SCHEMA = "copal.lineage/2"  # 2: withdrawn, matrix; damping and tokens of a layer
RECORD_FILE = "lineage.json"
SIGNATURE_FILE = "model.sig"  # see flows.lineage.signing
SUM_FOLDER = "state/sum"  # the part of a version that can be made again, see copal.state
CONTRIBUTION_FOLDER = "state/contribution"  # what a version keeps of its own domain; deleted by a purge alone
HASHED_FOLDERS = ("model", "components", "state")  # where a file that the record does not name could change a model


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
            weights_back (None where the parent is dense), damping, tokens (of the new domain that it read).
        code: {version, git_commit, dirty}; libraries: {name: version}.
        created: UTC time in ISO 8601.
        files: {path relative to the version's folder: SHA-256}, see `version_files`.

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
    problem = problem_with(record, SCHEMA)
    if problem:
        raise LineageError(f"{where}: {problem}")
    assert isinstance(record, dict)
    names = [domain["name"] for domain in record["domains"]]
    if names != sorted(set(names)):
        raise LineageError(f"{where}: domains must be sorted by name, each name once, not {shown(names)}")
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
    write_atomic(path, json_text(record))


def read_record(path: Path, valid: set[str] | None = None) -> dict[str, Any]:
    """Read a record and check its structure.

    Args:
        valid: digests of records whose structure was found to be right before; this one's is added.

    Raises:
        LineageError: no file, no JSON, another schema, or a field that is missing or of the wrong type.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LineageError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # also text that is not UTF-8
        raise LineageError(f"{path}: is not JSON: {error}") from error
    try:
        digest = fingerprint(record)
    except ValueError:  # NaN
        digest = ""
    if valid is None or digest not in valid:
        validate(record, str(path))
    if valid is not None:
        valid.add(digest)
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
    """SHA-256 of every file below `folder`, by POSIX path relative to `relative_to`; {} where there is no folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(relative_to).as_posix(): sha256_file(path) for path in paths}


def version_files(folder: Path) -> dict[str, str]:
    """`file_digests` of a version's folder: of all in it but the record itself and the signature."""
    found = file_digests(folder, folder)
    return {name: digest for name, digest in found.items() if name not in (RECORD_FILE, SIGNATURE_FILE)}


def verify_files(
    record: Mapping[str, Any], folder: Path, *, sum_dropped: bool = False, contribution_dropped: bool = False
) -> list[str]:
    """What differs between a version's folder and its record: `missing: F`, `changed: F`, `extra: F`; [] if nothing.

    Extra are files in `HASHED_FOLDERS` that the record does not name; other files beside them are not looked at.
    `sum_dropped`, `contribution_dropped`: that part of the version's state was dropped, so that a file of it may be
    missing, though not changed.
    """
    dropped = [
        *([SUM_FOLDER] if sum_dropped else []),
        *([CONTRIBUTION_FOLDER] if contribution_dropped else []),
    ]
    found: dict[str, str] = {}
    for name in HASHED_FOLDERS:
        found |= file_digests(folder / name, folder)
    for name in set(record["files"]) - set(found):
        if (folder / name).is_file():
            found[name] = sha256_file(folder / name)
    return file_differences(record["files"], found, dropped)


def file_differences(wanted: Mapping[str, str], found: Mapping[str, str], dropped: Iterable[str]) -> list[str]:
    """`missing: F`, `changed: F`, `extra: F` between {file: SHA-256} as wanted and as found; files of the folders
    `dropped` may be missing.
    """
    folders = tuple(f"{folder}/" for folder in dropped)
    differences = []
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            if not name.startswith(folders):
                differences.append(f"missing: {name}")
        elif name not in wanted:
            differences.append(f"extra: {name}")
        elif found[name] != wanted[name]:
            differences.append(f"changed: {name}")
    return differences


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a part of a record by their dotted names."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def step_key(parent_version: int, domain: str, dvc_md5: str, settings_fingerprint: str) -> str:
    """SHA-256 that names a step: the same parent, data and settings give the same key, and never two versions."""
    return fingerprint([parent_version, domain, dvc_md5, settings_fingerprint])


def withdrawal_key(parent_version: int, domain: str, dvc_md5: str, settings_fingerprint: str) -> str:
    """SHA-256 that names the step that takes a domain out; never that of a `step_key`."""
    return fingerprint([parent_version, domain, dvc_md5, settings_fingerprint, "withdrawn"])
