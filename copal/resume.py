"""What a step has finished block by block, so that one that was killed goes on from its last whole block.

    a folder of whoever works on it, by a name that nobody else knows; each machine has its own
        version/                              of the main process: model/ and state/ as far as they are written
        process-0/                            of each process that runs the step (`copal.processes`)
            step                              the fingerprint of the step that all of this belongs to
            statistics-00003.SHA.safetensors  a part: tensors, and JSON in the file's metadata
            hidden-00004.SHA.safetensors      another: what block 4 reads

The name of a part ends with the SHA-256 of the file, which is written beside, flushed and renamed. A part that says
that something is finished comes last: whatever of the version it tells of is on the disk before it. Where a single file
is not what its name says, all of it is thrown away, and the step begins anew.

Who goes on gives the folder a new name first. A process that was only paused, and wakes when another has taken over,
finds nothing to write to.

What a step has to lay aside in any case goes the same way; where nothing is to last, it has neither digest nor flush.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import safe_open
from torch import Tensor

from copal.checkpoint import save_shard
from copal.errors import DataError, ModelError, NumericsError, SettingsError, StateError
from copal.files import atomic_folder, flush, move_into_place, sha256_file, write_atomic
from copal.processes import from_main, gather, is_first_here, is_main, number

__all__ = ["Part", "Unfinished", "unfinished"]

_STEP, _SUFFIX = "step", ".safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What was laid aside: tensors on the CPU, and a JSON value by name."""

    tensors: Mapping[str, Tensor]
    told: Mapping[str, Any]


class Unfinished:
    """The parts of a step that is not finished yet. Made by `unfinished`.

    Attributes:
        version: the folder that becomes the step's output.
        lasts: whether another run may go on from here.
        seconds: of the parts of a step, what runs before this one took.
    """

    def __init__(self, folder: Path, version: Path, *, lasts: bool, files: Mapping[str, Path] | None = None) -> None:
        self.version, self.lasts = version, lasts
        self._folder, self._files = folder, dict(files or {})
        clocks = [_told(path).get("seconds", {}) for path in self._files.values()]
        self.seconds: dict[str, float] = max(clocks, key=lambda seconds: sum(seconds.values()), default={})

    def find(self, name: str) -> Part | None:
        """The part `name`, if there is one."""
        return self.read(name) if name in self._files else None

    def read(self, name: str) -> Part:
        """The part `name`.

        Raises:
            StateError: it is not there.
        """
        path = self._files.get(name)
        if path is None or not path.is_file():
            raise StateError(f"{self._folder} has no {name} any more: the step begins anew when it is run again")
        with safe_open(path, framework="pt") as file:
            return Part(tensors={key: file.get_tensor(key) for key in file.keys()}, told=_told(path))  # noqa: SIM118

    def write(self, name: str, tensors: Mapping[str, Tensor], told: Mapping[str, Any] | None = None) -> None:
        """Lay a part aside, in place of one of that name."""
        partial = self._folder / f".{name}.partial"
        on_cpu = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
        save_shard(partial, on_cpu, {"told": json.dumps(dict(told or {}))})
        if self.lasts:
            flush(partial)
        path = self._folder / (f"{name}.{sha256_file(partial)}{_SUFFIX}" if self.lasts else f"{name}{_SUFFIX}")
        partial.replace(path)
        before, self._files[name] = self._files.get(name), path
        if before not in (None, path):
            before.unlink(missing_ok=True)

    def finish(
        self,
        name: str,
        *,
        tensors: Mapping[str, Tensor] | None = None,
        told: Mapping[str, Any],
        files: Iterable[str],
        seconds: Mapping[str, float],
    ) -> None:
        """Say in a part `name` that something is finished, in every process; nothing where nothing is to last.

        Args:
            files: what was written for it in the folder `version`.
            seconds: what the parts of a step took so far.
        """
        if not self.lasts:
            return
        paths = {file: self.version / file for file in files}
        for path in (*paths.values(), *{path.parent for path in paths.values()}):
            flush(path)
        sizes = {file: path.stat().st_size for file, path in paths.items()}
        self.write(name, tensors or {}, {**told, "files": sizes, "seconds": dict(seconds)})
        flush(self._folder)
        gather(None)  # what the caller drops now no process needs to go on from here

    def drop(self, *names: str) -> None:
        """Remove parts, where they are there."""
        for name in names:
            if name in self._files:
                self._files.pop(name).unlink(missing_ok=True)


@contextmanager
def unfinished(out: Path, folder: Path | None, fingerprint: str) -> Iterator[Unfinished]:
    """Where a step works. On leaving, what it has written is flushed and appears as `out`.

    An error of what the step was given throws away what `folder` holds: the next run begins anew. Any other error, of
    the machine or of whoever ended it, leaves what is finished.

    Args:
        folder: where what is finished lasts, on the disk of `out`; None: nothing does.
        fingerprint: of the step. What another one has left in `folder` is thrown away.
    """
    if folder is None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with (
            atomic_folder(out) if is_main() else nullcontext(out) as version,
            tempfile.TemporaryDirectory(dir=out.parent, prefix=".step-") as scratch,
        ):
            yield Unfinished(Path(scratch), version, lasts=False)
        return
    work = _opened(folder, fingerprint)
    try:
        yield work
    except (DataError, ModelError, NumericsError, SettingsError, StateError):
        shutil.rmtree(work.version.parent, ignore_errors=True)
        raise
    if is_main():
        move_into_place(work.version, out)
    from_main("it is there")  # until then any machine may have to go on
    if is_first_here():
        shutil.rmtree(folder, ignore_errors=True)


def _opened(folder: Path, fingerprint: str) -> Unfinished:
    """What all processes have finished of the step; nothing where any of it is not whole."""
    ours = folder / from_main(uuid4().hex)
    if is_first_here():
        _take_over(folder, ours)
    gather("taken over")
    own, version = ours / f"process-{number()}", ours / "version"
    found = _whole(own, version, fingerprint)
    agreed = set.intersection(*gather(set(found)))
    parts = {name: path for name, path in found.items() if name in agreed}
    _keep(own, {own / _STEP, *parts.values()})
    if is_main():
        _keep(version, {version / file for path in parts.values() for file in _told(path).get("files", {})})
    own.mkdir(parents=True, exist_ok=True)
    write_atomic(own / _STEP, fingerprint)
    if is_main():
        version.mkdir(exist_ok=True)
    return Unfinished(own, version, lasts=True, files=parts)


def _take_over(folder: Path, ours: Path) -> None:
    """Give what lies in `folder` the new name `ours`."""
    folder.mkdir(parents=True, exist_ok=True)
    there = list(folder.iterdir())
    if len(there) == 1 and there[0].is_dir():
        there[0].rename(ours)
    else:
        for path in there:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        ours.mkdir()


def _keep(folder: Path, files: Collection[Path]) -> None:
    """Remove all files in `folder` but these."""
    for path in folder.rglob("*"):
        if path.is_file() and path not in files:
            path.unlink()


def _whole(own: Path, version: Path, fingerprint: str) -> dict[str, Path]:
    """The parts that this process left, by name; none where they are of another step, or one of them is damaged."""
    step = own / _STEP
    if not step.is_file() or step.read_text() != fingerprint:
        return {}
    found = {}
    for path in own.glob(f"*{_SUFFIX}"):
        name, _, digest = path.name.removesuffix(_SUFFIX).partition(".")
        if sha256_file(path) != digest:
            return {}
        for file, size in _told(path).get("files", {}).items():
            if not (version / file).is_file() or (version / file).stat().st_size != size:
                return {}
        found[name] = path
    return found


def _told(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        told: dict[str, Any] = json.loads(file.metadata()["told"])
    return told
