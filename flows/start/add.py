"""A domain from a user's files: looked at as a step would, put under `data/`, tracked by DVC and committed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from copal.domain_files import domain_files
from copal.errors import CopalError
from flows.data.dataset import MissingDataError
from flows.data.dvc import add_and_commit
from flows.data.git import git
from flows.data.recorded import dataset_of
from flows.data.sources import gather
from flows.data.task_files import read_tasks
from flows.project import Project, data_of
from flows.settings import check_domain_name
from flows.workspace import make_private

if TYPE_CHECKING:
    from copal.calibration import DomainWindows
    from flows.lineage.record import Domain

__all__ = ["AddError", "Added", "add_domain"]


class AddError(CopalError):
    """Data cannot be added to this workspace."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Added:
    """What was added.

    Attributes:
        commit: full SHA of HEAD, which has the pointer.
        files, size: how many, and their bytes.
        documents, windows: {calibration, evaluation}: how many; texts that are there twice count once.
        left_out: documents that the windows do without, since other domains have their text on the other side.
        unchecked: domains whose data is not at hand, so that nothing was held against them.
    """

    domain: str
    commit: str
    files: int
    size: int
    documents: dict[str, int]
    windows: dict[str, int]
    left_out: int
    unchecked: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def add_domain(project: Project, domain: str, paths: Sequence[Path], *, replace: bool = False) -> Added:
    """Make `paths` the data of a domain and commit its pointer, and nothing else.

    They are copied, except where the only path is `data/DOMAIN` itself. First the step's own windows are cut of them:
    what a step would refuse changes nothing here.

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
    target = workspace.data / domain
    here = len(paths) == 1 and paths[0].resolve() == target.resolve()
    tracked = target.exists() or target.with_name(f"{domain}.dvc").exists()
    if tracked and not here and not replace:
        raise AddError(f"data/{domain} is there already: --replace puts this data in its place, as a new version of it")
    _check_git(workspace.root, domain)
    make_private(workspace)
    with TemporaryDirectory(dir=workspace.private, prefix="add-") as scratch:
        folder = target if here else Path(scratch) / domain
        if not here:
            gather([path.expanduser() for path in paths], folder)
        windows, unchecked = _looked_at(project, domain, folder)
        read_tasks(domain, folder)
        files = domain_files(folder)
        with _in_place(folder, target, Path(scratch)):
            commit = add_and_commit(workspace.root, domain, f"{'Replace' if tracked and not here else 'Add'} {domain}")
    return Added(
        domain=domain,
        commit=commit,
        files=len(files),
        size=sum(file.size for file in files),
        documents={"calibration": windows.calibration_documents, "evaluation": windows.evaluation_documents},
        windows={"calibration": len(windows.calibration), "evaluation": len(windows.evaluation)},
        left_out=len(windows.left_out.calibration) + len(windows.left_out.evaluation),
        unchecked=unchecked,
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
def _in_place(folder: Path, target: Path, scratch: Path) -> Iterator[None]:
    """`folder` at `target` for good, unless what follows fails: then what was there before is there again."""
    if folder == target:
        yield
        return
    before, pointer = scratch / "before", target.with_name(f"{target.name}.dvc")
    pointed = pointer.read_bytes() if pointer.is_file() else None
    if target.exists():
        target.rename(before)
    folder.rename(target)
    try:
        yield
    except BaseException:
        shutil.rmtree(target)
        if before.exists():
            before.rename(target)
        if pointed is None:
            pointer.unlink(missing_ok=True)
        else:
            pointer.write_bytes(pointed)
        raise
