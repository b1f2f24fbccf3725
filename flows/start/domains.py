"""The demo domains: texts that any machine with Python can build from what is installed or in the package index.

python -m flows.start.domains NAME FOLDER
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import sys
import sysconfig
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

from copal.errors import CopalError
from copal.files import flush
from flows.models.packages import FetchError, package_file

__all__ = ["DOMAINS", "build_domain"]

DOMAINS = ("code", "legal", "medical")

_MOST_BYTES = 3_000_000
_FEWEST_CHARACTERS = 200

# Folders of the standard library that hold tests, vendored packages, old tools, or tables that a program wrote.
_NOT_CODE = {
    "__pycache__", "dist-packages", "encodings", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests",
}  # fmt: skip
_LICENCE = re.compile(r"licen[cs]e|copying|notice", re.IGNORECASE)
_NAMES = re.compile(r"authors|contributors", re.IGNORECASE)  # lists of people that lie beside the licences
_COPYRIGHT = re.compile(r"\W*(copyright|\(c\)|©|all rights reserved)", re.IGNORECASE)


def build_domain(name: str, target: Path) -> int:
    """Write the demo domain `name` to `target`/documents.jsonl and return the number of its documents.

    `code`: modules of the standard library of the running interpreter. `legal`: licences of the Python packages that
    are installed beside it, the same text with other copyright lines counted once. `medical`: ICD-10-CM (the
    diagnosis codes of the USA, public domain), one document a category. The same interpreter and packages give the
    same file; at most 3 MB, documents chosen by the hash of their id.

    Raises:
        FetchError: there is no such domain, or nothing to build it from.
    """
    builders = {"code": _code, "legal": _legal, "medical": _medical}
    if name not in builders:
        raise FetchError(f"there is no demo domain {name!r}; there are {', '.join(DOMAINS)}")
    found = {identity: text for identity, text in builders[name]() if len(text) >= _FEWEST_CHARACTERS}
    if not found:
        raise FetchError(f"nothing to build the demo domain {name} from on this machine")
    kept: list[str] = []
    size = 0
    for identity in sorted(found, key=lambda identity: hashlib.sha256(identity.encode()).digest()):
        size += len(found[identity].encode())
        if size > _MOST_BYTES:
            break
        kept.append(identity)
    lines = [json.dumps({"id": identity, "text": found[identity]}, ensure_ascii=False) for identity in sorted(kept)]
    target.mkdir(parents=True, exist_ok=True)
    partial = target / f".documents.jsonl.partial-{os.getpid()}"  # hidden: no reader of the folder takes it for data
    try:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
        flush(partial)
        partial.replace(target / "documents.jsonl")
    finally:
        partial.unlink(missing_ok=True)
    flush(target)
    return len(kept)


def _code() -> Iterator[tuple[str, str]]:
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        inside = path.relative_to(library)
        if not _NOT_CODE.intersection(inside.parts) and not path.name.startswith("_sysconfigdata"):
            yield inside.as_posix(), path.read_text(encoding="utf-8")


def _legal() -> Iterator[tuple[str, str]]:
    licences: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        for file in distribution.files or []:
            inside = file.as_posix().partition(".dist-info/")[2]
            if not _LICENCE.search(inside) or _NAMES.search(file.name):
                continue
            path = Path(str(file.locate()))
            try:
                licences[f"{distribution.name.lower()}/{inside}"] = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):  # listed and not there, or an old encoding: the others suffice
                continue
    seen: set[str] = set()
    for identity in sorted(licences):
        lines = [line for line in licences[identity].splitlines() if not _COPYRIGHT.match(line)]
        wording = " ".join("\n".join(lines).casefold().split())
        if wording not in seen:
            seen.add(wording)
            yield identity, licences[identity]


def _medical() -> Iterator[tuple[str, str]]:
    with tempfile.TemporaryDirectory(prefix="copal-") as scratch:
        tree = ET.parse(package_file("simple-icd-10-cm", ".xml", Path(scratch)))
    for chapter in tree.getroot().iter("chapter"):
        for category in chapter.iterfind("section/diag"):
            lines = [f"Chapter {chapter.findtext('name')}: {chapter.findtext('desc')}", ""]
            lines += _diagnosis(category)
            yield category.findtext("name", ""), "\n".join(lines)


_NOTES = {
    "inclusionTerm": "This diagnosis covers",
    "includes": "Includes",
    "excludes1": "Never coded together with",
    "excludes2": "Not included here",
    "codeFirst": "Code first",
    "useAdditionalCode": "Use an additional code",
    "codeAlso": "Code also",
    "notes": "Note",
}


def _diagnosis(node: ET.Element) -> list[str]:
    """Lines of text for a diagnosis and those under it, in document order."""
    lines = [f"{node.findtext('name')} {node.findtext('desc')}."]
    for tag, opening in _NOTES.items():
        notes = [" ".join((note.text or "").split()) for note in node.iterfind(f"{tag}/note")]
        if notes:
            lines.append(f"{opening}: {'; '.join(notes)}.")
    for child in node.iterfind("diag"):
        lines += _diagnosis(child)
    return lines


def main(arguments: list[str]) -> int:
    """Build one domain; 0, or 2 after a line that says what is wrong."""
    if len(arguments) != 2:
        print(f"usage: python -m flows.start.domains {{{','.join(DOMAINS)}}} FOLDER", file=sys.stderr)
        return 2
    try:
        count = build_domain(arguments[0], Path(arguments[1]))
    except CopalError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{arguments[1]}: {count} documents")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
