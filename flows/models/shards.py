"""The weights of an exported folder: shards by size, of which `copal audit whose` makes the version's own files again.

A version has a file for each decoder block, and its record has the digests of those. An export has other files, with
the same tensors. So it keeps the headers of the version's files: header and tensors together are those files, byte by
byte. Nothing in the folder is believed: a header or a tensor that was altered gives another digest than the record's,
and what stands around the tensors must be what an export writes there.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import BinaryIO

from copal.bounded import read_typed
from copal.errors import ModelError
from copal.files import json_text, write_json
from copal.folder import WEIGHTS, WEIGHTS_INDEX
from copal.progress import Progress
from flows.lineage.files import FolderFiles, file_digests
from flows.models.tensor_files import Tensor, TensorFile, beginning, header_of, pieces, read_tensor_file, tensors_of

__all__ = ["VERSION_FILES", "copy_model", "folder_files"]

VERSION_FILES = "version_files.json"
_SHARD = re.compile(rf"{re.escape(WEIGHTS)}|model-\d{{5,}}-of-\d{{5,}}\.safetensors")


@dataclass(frozen=True, slots=True)
class _VersionFiles:
    """What an export keeps of the version's weights files: their headers by name, and their index if they have one.

    Bytes are spelt as Latin-1, which has a character for each.
    """

    headers: Mapping[str, str]
    index: str | None


@dataclass(frozen=True, slots=True)
class _Place:
    path: Path
    offset: int
    tensor: Tensor


def copy_model(folder: Path, digests: Mapping[str, str], target: Path, shard_size: int, progress: Progress) -> None:
    """Copy the model in `folder` to the folder `target`, its weights into shards of at most `shard_size` bytes.

    Raises:
        ModelError: a file is not there, or is not the one with the SHA-256 that `digests` names.
    """
    for name in sorted(digests):
        if not (folder / name).is_file():
            raise ModelError(f"{folder / name} is missing")
    total, done = sum((folder / name).stat().st_size for name in digests), 0

    def read(size: int) -> None:
        nonlocal done
        done += size
        progress("copy", done, total)

    def check(name: str, found: str) -> None:
        if found != digests[name]:
            raise ModelError(f"{folder / name} is damaged")

    weights = {name: read_tensor_file(folder / name) for name in sorted(digests) if name.endswith(".safetensors")}
    for name in sorted(digests.keys() - weights.keys()):
        check(name, _copy_file(folder / name, target / name, read))
    shards = _split(weights.values(), shard_size)
    if {name: set(file.tensors) for name, file in weights.items()} == {name: set(of) for name, of in shards.items()}:
        for name in weights:  # they are such shards already
            check(name, _copy_file(folder / name, target / name, read))
    else:
        _keep_version_files(target, weights.values())
        places = _begin_shards(target, shards)
        for name, file in weights.items():
            check(name, _write_tensors(file, places, read))


def folder_files(folder: Path) -> FolderFiles:
    """The files in a folder; of an exported one with the files of its version in the place of its shards."""
    shards = sorted(path.name for path in folder.iterdir() if _SHARD.fullmatch(path.name) and path.is_file())
    try:
        kept = read_typed(_VersionFiles, folder / VERSION_FILES, ModelError) if shards else None
        made = None if kept is None else _version_files(folder, shards, kept)
    except (ModelError, UnicodeEncodeError):  # no export of this kind, or not any more: its files are what they are
        made = None
    there = set() if made is None else {*shards, WEIGHTS_INDEX, VERSION_FILES}
    digests = file_digests(folder, folder, without=there)
    sizes = {name: (folder / name).stat().st_size for name in digests}
    if made is None:
        return FolderFiles(digests, sizes)
    # Files that are there go before files that are only said to have been.
    return FolderFiles({**made.digests, **digests}, {**made.sizes, **sizes}, made.said, made.faults)


def _split(files: Iterable[TensorFile], shard_size: int) -> dict[str, dict[str, Tensor]]:
    """Which tensors go into which file, as transformers names those, each of at most `shard_size` bytes of tensors.

    A tensor that is larger than that has a file of its own.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    tensors = {name: tensor for file in files for name, tensor in file.tensors.items()}
    found = split_state_dict_into_shards_factory(
        {name: tensor.size for name, tensor in tensors.items()},
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_size,
    )
    return {file: {name: tensors[name] for name in names} for file, names in found.filename_to_tensors.items()}


def _begin_shards(folder: Path, shards: Mapping[str, Mapping[str, Tensor]]) -> dict[str, tuple[Path, int]]:
    """Write all of the shards and their index but the tensors; gives (file, offset) at which each tensor is to lie.

    An index that is there is that of other files, and goes.
    """
    places: dict[str, tuple[Path, int]] = {}
    (folder / WEIGHTS_INDEX).unlink(missing_ok=True)
    for file, tensors in shards.items():
        header, ordered = header_of(tensors)
        shard = TensorFile(folder / file, header, ordered)
        with shard.path.open("xb") as sink:
            sink.write(beginning(header))
        places |= {name: (shard.path, offset) for name, offset in shard.offsets()}
    if len(shards) > 1:
        (folder / WEIGHTS_INDEX).write_text(_index_text(shards), encoding="utf-8")
    return places


def _copy_file(source: Path, target: Path, read: Callable[[int], None]) -> str:
    """Copy a file to the new file `target`; gives the SHA-256 of what was read, and `read` hears of bytes."""
    digest = hashlib.sha256()
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as file, target.open("xb") as sink:
        _copy(file, source.stat().st_size, sink, digest, read)
    return digest.hexdigest()


def _write_tensors(source: TensorFile, places: Mapping[str, tuple[Path, int]], read: Callable[[int], None]) -> str:
    """Copy every tensor of a file to its place; gives the SHA-256 of what was read, and `read` hears of bytes."""
    digest = hashlib.sha256()
    with source.path.open("rb") as file:
        digest.update(file.read(len(beginning(source.header))))
        read(file.tell())
        for name, tensor in source.tensors.items():
            path, offset = places[name]
            with path.open("r+b") as sink:
                sink.seek(offset)
                _copy(file, tensor.size, sink, digest, read)
    return digest.hexdigest()


def _keep_version_files(folder: Path, files: Iterable[TensorFile]) -> None:
    """Keep in an exported folder what of the version's weights files will not be in its shards.

    `folder`: has the version's other files already, their index among them where there is one.
    """
    headers = {file.path.name: file.header.decode("latin-1") for file in files}
    index = folder / WEIGHTS_INDEX
    kept = _VersionFiles(headers, index.read_bytes().decode("latin-1") if index.is_file() else None)
    write_json(folder / VERSION_FILES, asdict(kept))


def _copy(file: BinaryIO, size: int, sink: BinaryIO, digest: hashlib._Hash, read: Callable[[int], None]) -> None:
    for data in pieces(file, size):
        digest.update(data)
        sink.write(data)
        read(len(data))


def _version_files(folder: Path, shards: Sequence[str], kept: _VersionFiles) -> FolderFiles:
    """The version's own weights files, as `kept` and the tensors in the shards make them.

    Raises:
        ModelError, UnicodeEncodeError: `kept` holds what is no header.
    """
    places, faults = _read_shards(folder, shards)
    left = dict(places)
    digests: dict[str, str] = {}
    sizes: dict[str, int] = {}
    said: dict[str, str] = {}
    for file, text in kept.headers.items():
        header = text.encode("latin-1")
        tensors = tensors_of(header, f"{folder / VERSION_FILES}: {file}")
        here = {name: left.pop(name) for name, tensor in tensors.items() if _lies(left, name, tensor)}
        away = [name for name in tensors if name not in here]
        digests[file] = "" if away else _digest(header, list(here.values()))
        sizes[file] = len(beginning(header)) + sum(tensor.size for tensor in tensors.values())
        said[file] = f"{file} of the version, with {_named(tensors)}{_lacking(away)}"
    if kept.index is not None:
        index = kept.index.encode("latin-1")
        digests[WEIGHTS_INDEX], sizes[WEIGHTS_INDEX] = hashlib.sha256(index).hexdigest(), len(index)
        said[WEIGHTS_INDEX] = f"{WEIGHTS_INDEX} of the version, kept in {VERSION_FILES}"
    if left:
        faults.append(f"extra: {_named(left)} in the shards")
    if (folder / VERSION_FILES).read_bytes() != json_text(asdict(kept)).encode():
        faults.append(f"changed: {VERSION_FILES}")
    return FolderFiles(digests, sizes, said, tuple(faults))


def _read_shards(folder: Path, shards: Sequence[str]) -> tuple[dict[str, _Place], list[str]]:
    """Where each tensor lies, and what of the shards and their index is not as an export writes it."""
    places: dict[str, _Place] = {}
    grouped: dict[str, Mapping[str, Tensor]] = {}
    faults = []
    for file in shards:
        try:
            shard = read_tensor_file(folder / file)
        except ModelError:
            faults.append(f"changed: {file} (it is damaged)")
            continue
        twice = places.keys() & shard.tensors.keys()
        if twice:
            faults.append(f"extra: {_named(twice)} in {file}, and in another shard as well")
        if shard.header != header_of(shard.tensors)[0]:
            faults.append(f"changed: {file} (its header)")
        grouped[file] = shard.tensors
        places |= {name: _Place(shard.path, offset, shard.tensors[name]) for name, offset in shard.offsets()}
    index = folder / WEIGHTS_INDEX
    wanted = None if list(grouped) == [WEIGHTS] else _index_text(grouped).encode()
    found = index.read_bytes() if index.is_file() else None
    if wanted != found:
        kind = "missing" if found is None else "extra" if wanted is None else "changed"
        faults.append(f"{kind}: {WEIGHTS_INDEX}")
    return places, faults


def _lies(places: Mapping[str, _Place], name: str, tensor: Tensor) -> bool:
    return name in places and places[name].tensor == tensor


def _digest(header: bytes, places: Iterable[_Place]) -> str:
    """SHA-256 of the file that a header and the tensors after it make."""
    digest = hashlib.sha256(beginning(header))
    for place in places:
        with place.path.open("rb") as file:
            file.seek(place.offset)
            for data in pieces(file, place.tensor.size):
                digest.update(data)
    return digest.hexdigest()


def _index_text(shards: Mapping[str, Mapping[str, Tensor]]) -> str:
    size = sum(tensor.size for tensors in shards.values() for tensor in tensors.values())
    placed = {name: file for file, tensors in shards.items() for name in tensors}
    return json_text({"metadata": {"total_size": size}, "weight_map": placed})


def _named(names: Iterable[str]) -> str:
    """Tensors, for people: how many, and what their names have in common."""
    listed = sorted(names)
    if len(listed) == 1:
        return f"the tensor {listed[0]}"
    parts = zip(*(name.split(".") for name in listed), strict=False)
    common = ".".join(part[0] for part in takewhile(lambda part: len(set(part)) == 1, parts))
    return f"{len(listed)} tensors{common and f' of {common}'}"


def _lacking(away: Sequence[str]) -> str:
    return (
        f", of which {_named(away)} {'is' if len(away) == 1 else 'are'} not there as the version has it" if away else ""
    )
