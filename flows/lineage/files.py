"""The files of a version and their SHA-256, as its record names them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from copal.files import sha256_file
from flows.lineage.record import RECORD_FILE, Record

__all__ = [
    "CONTRIBUTION_FOLDER",
    "HASHED_FOLDERS",
    "PARTS",
    "SIGNATURE_FILE",
    "SUM_FOLDER",
    "FolderFiles",
    "file_differences",
    "file_digests",
    "part_of",
    "verify_files",
    "version_files",
]

SIGNATURE_FILE = "model.sig"  # see flows.lineage.signing
SUM_FOLDER = "state/sum"  # the part of a version that can be made again, see copal.state
CONTRIBUTION_FOLDER = "state/contribution"  # what a version keeps of its own domain; deleted by a purge alone
HASHED_FOLDERS = ("model", "components", "state")  # where a file that the record does not name could change a model

PARTS = {  # of a version, and why its files differ from those of another
    "weights": "each step decides masks from the dense weights anew, and solves for the weights that stay",
    "model's other files": "another base, or another transformers wrote them",
    "contribution": "statistics of the domain that the version adapted to: each has its own",
    "running sum": "statistics of all its domains together",
    "manifest and report": "they list the domains, and what the step did to each linear",
    "MLflow's files": "another MLflow, or other libraries to load the model with",
}


def part_of(name: str) -> str:
    """Which of `PARTS` a file of a version belongs to, by its path."""
    if name.startswith("model/"):
        return "weights" if name.endswith(".safetensors") else "model's other files"
    for folder, part in ((CONTRIBUTION_FOLDER, "contribution"), (SUM_FOLDER, "running sum")):
        if name.startswith(f"{folder}/"):
            return part
    return "manifest and report" if name.startswith(("state/", "report")) else "MLflow's files"


@dataclass(frozen=True, slots=True)
class FolderFiles:
    """What is compared of a folder that may be a version's.

    Attributes:
        digests: SHA-256 by path relative to the folder.
        sizes: bytes, by the same paths.
        said: what people are told in the place of a path.
        faults: differences from any version, as in `file_differences`.
    """

    digests: Mapping[str, str]
    sizes: Mapping[str, int]
    said: Mapping[str, str] = field(default_factory=dict)
    faults: tuple[str, ...] = ()


def file_digests(folder: Path, relative_to: Path, without: Collection[str] = ()) -> dict[str, str]:
    """SHA-256 of every file below `folder`, by POSIX path relative to `relative_to`; {} where there is no folder.

    `without`: paths of files that are left out.
    """
    paths = {path.relative_to(relative_to).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: sha256_file(path) for name, path in paths.items() if name not in without}


def version_files(folder: Path) -> dict[str, str]:
    """`file_digests` of a version's folder: of all in it but the record itself and the signature."""
    found = file_digests(folder, folder)
    return {name: digest for name, digest in found.items() if name not in (RECORD_FILE, SIGNATURE_FILE)}


def verify_files(
    record: Record, folder: Path, *, sum_dropped: bool = False, contribution_dropped: bool = False
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
    for name in set(record.files) - set(found):
        if (folder / name).is_file():
            found[name] = sha256_file(folder / name)
    return file_differences(record.files, found, dropped)


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
