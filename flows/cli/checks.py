"""A check of `copal doctor`: what was found of one thing, and what to do."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata

__all__ = ["Check", "package"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """What a look at one thing found.

    Attributes:
        ok: True; False where copal cannot work like this; None where it can, but the user should know.
        advice: what to do; empty where there is nothing to do.
    """

    name: str
    ok: bool | None
    found: str
    advice: str = ""


def package(name: str) -> Check:
    """Whether a package is installed in the range that copal's own metadata asks for."""
    from packaging.requirements import Requirement

    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name=name, ok=False, found="is not installed", advice=f"pip install {name}")
    try:
        wanted = [Requirement(line) for line in metadata.requires("copal") or []]
    except metadata.PackageNotFoundError:  # copal runs from its sources
        wanted = []
    for requirement in wanted:
        fits = requirement.specifier.contains(version, prereleases=True)
        if requirement.name == name and not requirement.marker and not fits:
            return Check(
                name=name,
                ok=False,
                found=f"{version}, copal needs {requirement.specifier}",
                advice=f"pip install '{name}{requirement.specifier}'",
            )
    return Check(name=name, ok=True, found=version)
