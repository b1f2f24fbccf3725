"""A version's model as a folder of its own, for whoever serves it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from copal.errors import CopalError, ModelError
from copal.files import atomic_folder, write_atomic
from copal.progress import Progress
from flows.models.card import CARD_FILE, license_of, model_card
from flows.models.shards import copy_model

if TYPE_CHECKING:
    from flows.lineage.entries import GatesDetails
    from flows.registry.registry import Registry
    from flows.registry.versions import ModelVersion

__all__ = ["ExportError", "export"]


class ExportError(CopalError):
    """A version's model cannot be copied: its place is taken, or its files are not those of its record."""


def export(
    registry: Registry,
    version: ModelVersion,
    gates: GatesDetails | None,
    target: Path,
    shard_size: int,
    progress: Progress,
) -> None:
    """Copy a version's model to the new folder `target`: a plain Hugging Face folder with a card, checked file by file.

    Its weights lie in shards by size (`flows.models.shards`); where the version's own files are just those, they are
    copied. A README that came with the base model is there as BASE_README.md.

    Args:
        gates: the newest results of the version's gates, for the card; None where they never ran.
        shard_size: bytes of the tensors in a file, at most.

    Raises:
        ExportError: `target` is taken, or a file is not the one that the version's record names.
        RegistryError: the version's files are not there.
    """
    target = target.expanduser().resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ExportError(f"{target} exists and is not an empty folder; name a new one")
    record = registry.record(version)
    digests = {
        name.removeprefix("model/"): digest for name, digest in record.files.items() if name.startswith("model/")
    }
    folder = registry.folder(version) / "model"
    with atomic_folder(target) as partial:
        try:
            copy_model(folder, digests, partial, shard_size, progress)
        except ModelError as error:
            raise ExportError(f"{error}; bring version {version.number} back from a copy") from error
        card = model_card(version.number, record, license_of(partial), gates)
        if (partial / CARD_FILE).exists():
            (partial / CARD_FILE).rename(partial / f"BASE_{CARD_FILE}")
        write_atomic(partial / CARD_FILE, card)
