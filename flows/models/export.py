"""A version's model as a folder of its own, for whoever serves it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from copal.errors import CopalError
from copal.files import atomic_folder, write_atomic
from copal.progress import Progress
from flows.models.card import CARD_FILE, license_of, model_card

if TYPE_CHECKING:
    from flows.lineage.entries import GatesDetails
    from flows.registry.registry import Registry
    from flows.registry.versions import ModelVersion

__all__ = ["ExportError", "export"]

_COPY_BYTES = 16 << 20


class ExportError(CopalError):
    """A version's model cannot be copied: its place is taken, or its files are not those of its record."""


def export(
    registry: Registry, version: ModelVersion, gates: GatesDetails | None, target: Path, progress: Progress
) -> None:
    """Copy a version's model to the new folder `target`: a plain Hugging Face folder with a card, checked file by file.

    A README that came with the base model is there as BASE_README.md.

    Args:
        gates: the newest results of the version's gates, for the card; None where they never ran.

    Raises:
        ExportError: `target` is taken, or a file is not the one that the version's record names.
        RegistryError: the version's files are not there.
    """
    target = target.expanduser().resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ExportError(f"{target} exists and is not an empty folder; name a new one")
    record = registry.record(version)
    digests = record.files
    folder = registry.folder(version)
    names = sorted(name for name in digests if name.startswith("model/"))
    sizes = {name: (folder / name).stat().st_size for name in names if (folder / name).is_file()}
    done = 0
    with atomic_folder(target) as partial:
        for name in names:
            if name not in sizes:
                raise ExportError(f"{folder / name} is missing; bring version {version.number} back from a copy")
            copy = partial / Path(name).relative_to("model")
            copy.parent.mkdir(parents=True, exist_ok=True)
            digest = hashlib.sha256()
            with (folder / name).open("rb") as source, copy.open("xb") as sink:
                while data := source.read(_COPY_BYTES):
                    digest.update(data)
                    sink.write(data)
                    done += len(data)
                    progress("copy", done, sum(sizes.values()))
            if digest.hexdigest() != digests[name]:
                raise ExportError(f"{folder / name} is damaged; bring version {version.number} back from a copy")
        card = model_card(version.number, record, license_of(partial), gates)
        if (partial / CARD_FILE).exists():
            (partial / CARD_FILE).rename(partial / f"BASE_{CARD_FILE}")
        write_atomic(partial / CARD_FILE, card)
