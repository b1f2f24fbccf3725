"""A domain from a user's files: looked at as a step would, put under `data/`, tracked by DVC and committed.

    .copal/add-<domain>-<random>/<domain>/   what is to be its data
                                 .before/    the data that it had, until the pointer of the new is committed
    .copal/add.lock                          held by who adds; what another one finds there a killed one has left

So data that was moved away is under `.before` until then, however the process ends. The next `copal add` moves it back
where nothing has taken its place. Where new data has, it stays until that is committed or deleted, as `copal doctor`
tells.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

from copal.domain_files import domain_files
from copal.errors import CopalError
from copal.files import flush, locked, locked_if_free
from flows.data.dataset import MissingDataError
from flows.data.dvc import add_and_commit
from flows.data.git import git
from flows.data.recorded import dataset_of
from flows.data.sources import gather
from flows.data.task_files import read_tasks
from flows.project import Project, data_of
from flows.settings import check_domain_name
from flows.workspace import Workspace, make_private

if TYPE_CHECKING:
    from copal.calibration import DomainWindows
    from flows.lineage.record import Domain

__all__ = ["AddError", "Added", "add_domain", "moved_away"]

_BEFORE = ".before"  # no domain has such a name
_SCRATCH = re.compile(r"add-(.+)-[a-z0-9_]{8}")


class AddError(CopalError):
    """Data cannot be added to this workspace."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Added:
    """What was added.

    Attributes:
        commit: full SHA of HEAD, which has the pointer.
        files, size: how many, and their bytes.
        documents, windows: {calibration, evaluation}: how many; texts that are there twice count once.
        repeated: documents that are not counted, since another one has their text.
        left_out: documents that the windows do without, since other domains have their text on the other side.
        unchecked: domains whose data is not at hand, so that nothing was held against them.
        brought_back: domains whose data lies under `data/` again, which an add that was killed had moved away.
    """

    domain: str
    commit: str
    files: int
    size: int
    documents: dict[str, int]
    windows: dict[str, int]
    repeated: int
    left_out: int
    unchecked: tuple[str, ...]
    brought_back: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def add_domain(project: Project, domain: str, paths: Sequence[Path], *, replace: bool = False) -> Added:
    """Make `paths` the data of a domain and commit its pointer, and nothing else.

    They are copied, except where the only path is `data/DOMAIN` itself. First the step's own windows are cut of them:
    what a step would refuse changes nothing here. What an add that was killed had moved away is moved back before;
    waits for an add that runs.

    Args:
        replace: take the place of the data that is there.

    Raises:
        AddError: the data of this workspace lies elsewhere, or the domain has data already.
        DataError: its name, or what `paths` hold, is not what a step can use.
        CopalError: git, DVC or the registry refuse.
    """
    check_domain_name(domain)
    workspace, watch = project.workspace, project.settings.watch
    if project.url or watch.repository:
        where = project.url or watch.repository
        raise AddError(f"the data of this workspace comes from {where}: add it in a clone of that, and push")
    make_private(workspace)
    with locked(_lock(workspace)):
        brought_back = _bring_back(workspace)
        return _add(project, domain, paths, replace, brought_back)


def _add(project: Project, domain: str, paths: Sequence[Path], replace: bool, brought_back: tuple[str, ...]) -> Added:
    workspace = project.workspace
    target = workspace.data / domain
    here = len(paths) == 1 and paths[0].resolve() == target.resolve()
    tracked = target.exists() or target.with_name(f"{domain}.dvc").exists()
    if tracked and not here and not replace:
        raise AddError(f"data/{domain} is there already: --replace puts this data in its place, as a new version of it")
    _check_git(workspace.root, domain)
    with _scratch(workspace, domain) as scratch:
        folder = target if here else scratch / domain
        if not here:
            gather([path.expanduser() for path in paths], folder)
        windows, unchecked = _looked_at(project, domain, folder)
        read_tasks(domain, folder)
        files = domain_files(folder)
        with _in_place(folder, target, scratch / _BEFORE):
            commit = add_and_commit(workspace.root, domain, f"{'Replace' if tracked and not here else 'Add'} {domain}")
        _drop_before(workspace, domain)
    return Added(
        domain=domain,
        commit=commit,
        files=len(files),
        size=sum(file.size for file in files),
        documents={"calibration": windows.calibration_documents, "evaluation": windows.evaluation_documents},
        windows={"calibration": len(windows.calibration), "evaluation": len(windows.evaluation)},
        repeated=windows.repeated_documents,
        left_out=len(windows.left_out.calibration) + len(windows.left_out.evaluation),
        unchecked=unchecked,
        brought_back=brought_back,
    )


def _check_git(root: Path, domain: str) -> None:
    """Check that git does not keep the data itself, which DVC is to track."""
    kept = git(root, "ls-files", "--", f"data/{domain}/").splitlines()
    if kept:
        raise AddError(
            f"git tracks {kept[0]} itself{f' and {len(kept) - 1} more' if kept[1:] else ''}: `git rm -r --cached "
            f"data/{domain}`, commit that, and add the data again"
        )


def _looked_at(project: Project, domain: str, folder: Path) -> tuple[DomainWindows, tuple[str, ...]]:
    """The windows of the data in `folder`, and the earlier domains that it was not held against."""
    from flows.step.windows import cut_windows

    registry = project.registry
    root, head = registry.root(), registry.head()
    if root is None or head is None:
        raise AddError(f"{project.name} has no base model yet: run `copal init {project.place} --base SOURCE` first")
    others: list[Domain] = [entry for entry in registry.record(head).domains_at(head.number) if entry.name != domain]
    data, unchecked = {domain: str(folder)}, []
    for entry in others:
        try:
            data[entry.name] = str(data_of(project, dataset_of(entry)))
        except MissingDataError:
            unchecked.append(entry.name)
    base = registry.folder(root) / "model"
    windows = cut_windows(base, data, others, domain, None, project.settings.calibration)
    return windows[domain], tuple(unchecked)


@contextmanager
def _in_place(folder: Path, target: Path, before: Path) -> Iterator[None]:
    """`folder` at `target`, and what was there at `before`; unless what follows fails: then that is there again."""
    if folder == target:
        yield
        return
    pointer = target.with_name(f"{target.name}.dvc")
    pointed = pointer.read_bytes() if pointer.is_file() else None
    try:
        if target.exists():
            target.rename(before)
        folder.rename(target)
        yield
    except BaseException:
        if not folder.exists():
            target.rename(folder)
        if before.exists():
            before.rename(target)
        if pointed is None:
            pointer.unlink(missing_ok=True)
        else:
            pointer.write_bytes(pointed)
        raise


# --- what an add that was killed leaves


def moved_away(workspace: Workspace) -> list[tuple[str, Path]]:
    """Domains with the folders of data that killed adds have moved away; none as long as an add runs."""
    if not _scratches(workspace):
        return []
    with locked_if_free(_lock(workspace)) as free:
        found = _scratches(workspace) if free else []
        return [(domain, scratch / _BEFORE) for domain, scratch in found if (scratch / _BEFORE).exists()]


def _bring_back(workspace: Workspace) -> tuple[str, ...]:
    brought = []
    for domain, scratch in _scratches(workspace):
        before, target = scratch / _BEFORE, workspace.data / domain
        if before.exists():
            if target.exists():
                continue
            before.rename(target)
            flush(target.parent)
            brought.append(domain)
        shutil.rmtree(scratch)
    return tuple(brought)


def _drop_before(workspace: Workspace, domain: str) -> None:
    for name, scratch in _scratches(workspace):
        before = scratch / _BEFORE
        if name == domain and before.exists():
            before.rename(scratch / ".dropped")  # so that no half of it is ever brought back
            shutil.rmtree(scratch)


@contextmanager
def _scratch(workspace: Workspace, domain: str) -> Iterator[Path]:
    folder = Path(mkdtemp(prefix=f"add-{domain}-", dir=workspace.private))
    try:
        yield folder
    finally:
        if not (folder / _BEFORE).exists():  # else it could not be moved back
            shutil.rmtree(folder, ignore_errors=True)


def _scratches(workspace: Workspace) -> list[tuple[str, Path]]:
    found = [(_SCRATCH.fullmatch(path.name), path) for path in sorted(workspace.private.glob("add-*"))]
    return [(match[1], path) for match, path in found if match]


def _lock(workspace: Workspace) -> Path:
    return workspace.private / "add.lock"
