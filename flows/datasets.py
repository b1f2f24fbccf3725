"""Dataset versions: which data git and DVC name, and the data itself. The only module that imports DVC.

A *domain* is a folder directly under `data/` that DVC tracks, with a `.dvc` pointer or as the output of a stage in
`dvc.lock`. A *dataset version* is its md5 at a commit. A tracked file (`data/x.jsonl`) is no domain, nor is a stage's
output before its first `dvc repro` (it has no md5). Nothing here touches the work tree, but for `init_repository` and
`add_and_commit`.

The domains may be those of another repository than the workspace: `data_root` tells, and clones where it has to.

Git is asked through the `git` command; DVC, which takes a second to import, inside the functions that need it.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import posixpath
import re
import shutil
import tempfile
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from copal.errors import CopalError
from copal.files import flush, freed_bytes, locked, write_atomic
from flows.git import commit as git_commit
from flows.git import git, reason, run_git, start_git
from flows.settings import WatchSettings, Workspace, without_secrets

__all__ = [
    "DatasetError",
    "DatasetVersion",
    "MissingDataError",
    "add_and_commit",
    "check_stored",
    "data_root",
    "dataset_version",
    "dataset_versions",
    "drop_copies",
    "fetch",
    "fetch_version",
    "in_history",
    "init_repository",
    "is_url",
    "resolve_commit",
    "scratch_folders",
]

_SCRATCH = "verify-"
_REMOTE_HEAD = "refs/copal/head"  # in a clone; git knows no other place for a HEAD without a branch


class DatasetError(CopalError):
    """A repository, a revision or a dataset version cannot be used as it is."""


class MissingDataError(DatasetError):
    """A pointer names data that is neither in the cache nor on a remote."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetVersion:
    """One version of a domain's data.

    Attributes:
        domain: name of the folder, as it is; the caller checks whether it may name a domain.
        path: of the folder in the repository, `data/<domain>`.
        md5: DVC's hash of the folder, `<32 hexadecimal digits>.dir`.
        git_rev: full SHA of the commit in which the pointer last changed to this md5.
        repository: URL of `origin`, without password; without an origin the absolute path.
    """

    domain: str
    path: str
    md5: str
    git_rev: str
    repository: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pointer:
    domain: str
    md5: str
    file: str  # path in git of the .dvc file or of dvc.lock
    output: str  # how that file spells the output


# --- which versions there are


def dataset_versions(repo: Path, rev: str = "HEAD") -> list[DatasetVersion]:
    """The version of every domain at a commit, in the order in which the pointers last changed in git history.

    Oldest first, by topological order; pointers that changed in one commit by name. An older md5 that comes back
    (A, B, A) changed last when it came back. A repository without commits has no versions. In a shallow clone, what
    changed before the cut counts as changed at the cut.

    Raises:
        DatasetError: `repo` is not the root of a git repository, `rev` is unknown, or DVC cannot read a pointer.
    """
    root = _git_root(repo)
    commit = _find_commit(root, rev)
    if commit is None:
        if rev == "HEAD":
            return []
        raise _unknown_revision(root, rev)
    pointers = _pointers(root, commit)
    if not pointers:
        return []
    with _tracked_reader(root) as tracked:
        changes = [(pointer, _last_change(root, commit, pointer, tracked)) for pointer in pointers]
    order = {sha: place for place, sha in enumerate(git(root, "rev-list", "--topo-order", "--reverse", commit).split())}
    repository = _repository(root)
    return [
        DatasetVersion(
            domain=pointer.domain,
            path=f"data/{pointer.domain}",
            md5=pointer.md5,
            git_rev=sha,
            repository=repository,
        )
        for pointer, sha in sorted(changes, key=lambda change: (order[change[1]], change[0].domain))
    ]


def dataset_version(repo: Path, domain: str, rev: str = "HEAD") -> DatasetVersion:
    """The version of one domain at a commit.

    Raises:
        DatasetError: as `dataset_versions`, or DVC does not track the domain there; says what it tracks.
    """
    versions = {version.domain: version for version in dataset_versions(repo, rev)}
    if domain not in versions:
        there = ", ".join(sorted(versions)) or "no domain"
        raise DatasetError(f"DVC does not track data/{domain} at {rev} of {repo}; it tracks {there}")
    return versions[domain]


def resolve_commit(repo: Path, rev: str) -> str:
    """Full SHA of the commit that `rev` (branch, tag, SHA, ...) names.

    Raises:
        DatasetError: `repo` is not the root of a git repository, or `rev` is unknown there.
    """
    root = _git_root(repo)
    commit = _find_commit(root, rev)
    if commit is None:
        raise _unknown_revision(root, rev)
    return commit


def in_history(repo: Path, commit: str, rev: str) -> bool:
    """Whether `commit` is `rev` or came before it; no where the repository has no such commit."""
    return run_git(repo, "merge-base", "--is-ancestor", commit, rev).returncode == 0


def _pointers(root: Path, commit: str) -> list[_Pointer]:
    with _dvc_errors(f"DVC cannot read {root} at {commit[:10]}"), _open_dvc(root, commit) as dvc:
        dvc.index.check_graph()  # an output that two pointers track is an error
        return [
            _Pointer(domain=output.index_key[1][1], md5=output.hash_info.value, file=file, output=output.def_path)
            for output in dvc.index.outs
            if _is_domain(output)
            for file in [_pointer_file(output.stage)]
        ]


def _is_domain(output: Any) -> bool:
    place, key = output.index_key
    is_folder = bool(output.hash_info) and output.hash_info.isdir  # no md5: a stage that never ran
    return place == "repo" and len(key) == 2 and key[0] == "data" and is_folder


def _pointer_file(stage: Any) -> str:
    file = str(stage.path_in_repo)
    return file if file.endswith(".dvc") else posixpath.join(posixpath.dirname(file), "dvc.lock")


def _last_change(
    root: Path, commit: str, pointer: _Pointer, tracked: Callable[[str, str], frozenset[tuple[str, str]]]
) -> str:
    """The commit that brought in the pointer's md5: none of its parents has it.

    Git gives the few commits that touched the file, with the parents that history has when only they are in it. The
    walk goes back through them as long as a parent has the same md5: past commits that touched something else in the
    file, and through merges to the side that the md5 came from.
    """
    listed = git(root, "rev-list", "--topo-order", "--parents", commit, "--", f":(top,literal){pointer.file}")
    parents = {sha: older for sha, *older in (line.split() for line in listed.splitlines())}
    wanted = (pointer.output, pointer.md5)
    current = next(iter(parents), commit)  # none: DVC drops line breaks from names, so git knows the file by another
    while same := [sha for sha in parents.get(current, []) if wanted in tracked(sha, pointer.file)]:
        current = same[0]
    return current


@contextmanager
def _tracked_reader(root: Path) -> Iterator[Callable[[str, str], frozenset[tuple[str, str]]]]:
    """A function (commit, file) -> the (output, md5) pairs of that pointer file; one git process serves all calls."""
    with start_git(root, "cat-file", "--batch") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        requests, answers = process.stdin, process.stdout

        def read(commit: str, file: str) -> bytes:
            requests.write(os.fsencode(f"{commit}:{file}\n"))
            requests.flush()
            header = answers.readline()  # b"<sha> blob <size>\n", or b"<request> missing\n"
            if header.endswith(b" missing\n"):
                return b""
            size = int(header.split()[2])
            return answers.read(size + 1)[:size]

        @functools.cache
        def tracked(commit: str, file: str) -> frozenset[tuple[str, str]]:
            return _parse_pointer(read(commit, file))

        yield tracked
        requests.close()


def _parse_pointer(content: bytes) -> frozenset[tuple[str, str]]:
    """The (output, md5) pairs of a .dvc file or a dvc.lock; none where an old commit has no such file."""
    import yaml

    try:
        parsed = yaml.load(content, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, ValueError):
        return frozenset()
    if not isinstance(parsed, dict):
        return frozenset()
    stages = parsed.get("stages")
    entries = stages.values() if isinstance(stages, dict) else [parsed]
    lists = [entry.get("outs") for entry in entries if isinstance(entry, dict)]
    outputs = [output for outs in lists if isinstance(outs, list) for output in outs if isinstance(output, dict)]
    return frozenset((str(output.get("path")), str(output.get("md5"))) for output in outputs)


# --- the data of a version


def fetch(repo: Path, version: DatasetVersion, cache: Path, *, remote_only: bool = False) -> Path:
    """A folder with the data of `version`: `cache/<md5>`, fetched from DVC's cache or remote, checked, then renamed.

    Every file is hashed anew, and the hash of the folder is computed from those, so what is returned is what the
    pointer names, whatever a DVC cache holds. A folder that is there already is used as it is: only the rename that
    ends a fetch makes it, so it is whole. Processes that want the same version wait for the first.

    Args:
        remote_only: where the repository has a default remote, pass by DVC's cache.

    Raises:
        MissingDataError: a file is neither in DVC's cache nor on a remote that answers.
        DatasetError: a file is not what the pointer says, or DVC cannot read the repository at the version's commit.
    """
    if not re.fullmatch(r"[0-9a-f]{32}\.dir", version.md5):  # it becomes a path
        raise DatasetError(f"{version.path}: {version.md5!r} is not the md5 of a folder that DVC tracks")
    if (cache / version.md5).is_dir():
        return cache / version.md5
    root = _git_root(repo)
    try:
        return _fetch_once(root, version, cache, remote_only=remote_only)
    except OSError as error:
        raise DatasetError(f"cannot fetch {version.path} into {cache}: {_one_line(error)}") from error


def _fetch_once(root: Path, version: DatasetVersion, cache: Path, *, remote_only: bool) -> Path:
    target = cache / version.md5
    partial = cache / f".{version.md5}.partial"
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache / f".{version.md5}.lock"):
        if target.is_dir():  # another process was first
            return target
        if partial.exists():  # a process that was killed left it: whoever writes it holds the lock
            shutil.rmtree(partial)
        partial.mkdir()
        try:
            files = partial / "files"
            _download(root, version, files, scratch=partial / "dvc", remote_only=remote_only)
            files.rename(target)
            flush(cache)
        finally:
            shutil.rmtree(partial)
    return target


def _download(root: Path, version: DatasetVersion, files: Path, *, scratch: Path, remote_only: bool) -> None:
    from dvc.api import DVCFileSystem
    from dvc_data.index import DataIndexDirError

    where = f"{version.path} at commit {version.git_rev[:10]}"
    missing = MissingDataError(
        f"the pointer of {where} names md5 {version.md5}, but its data is neither in DVC's cache nor on a remote "
        "that answers: run `dvc push` where the data is"
    )
    with _dvc_errors(f"DVC cannot read {where}"), _open_dvc(root, version.git_rev, scratch, remote_only) as dvc:
        try:
            listed = _listing(dvc, version)
            if any(part in ("", ".", "..") for name in listed for part in name.split("/")):
                raise DatasetError(f"{where} lists a file outside its folder; nothing was fetched")
            DVCFileSystem(dvc).get(version.path, str(files), recursive=True)
        except DataIndexDirError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise missing from error
            raise DatasetError(f"DVC cannot list {where} (md5 {version.md5}): {_one_line(error.__cause__)}") from error
        except FileNotFoundError as error:
            raise missing from error
    files.mkdir(exist_ok=True)  # a dataset without files
    _verify(version, files, listed)


def _listing(dvc: Any, version: DatasetVersion) -> dict[str, Any]:
    """{path in the folder: hash} as the .dir object in DVC's cache or remote says; empty where git keeps the files."""
    key = tuple(version.path.split("/"))
    index = dvc.index.data["repo"]
    entries = index.iteritems(prefix=key) if index.has_node(key) else ()
    return {"/".join(path[len(key) :]): entry.hash_info for path, entry in entries if entry.hash_info and path != key}


def _verify(version: DatasetVersion, files: Path, listed: dict[str, Any]) -> None:
    from dvc_data.hashfile.hash import fobj_md5
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_data.hashfile.tree import Tree

    tree = Tree()
    for path in sorted(files.rglob("*")):
        if path.is_dir():
            flush(path)
            continue
        name = path.relative_to(files).as_posix()
        wanted = listed.get(name)
        algorithm = wanted.name if wanted else "md5"  # pointers of DVC 2: md5-dos2unix, with Unix line ends in text
        with path.open("rb") as file:
            md5 = fobj_md5(file, name=algorithm)
            os.fsync(file.fileno())
        if wanted and md5 != wanted.value:
            raise DatasetError(
                f"{version.path}/{name} at commit {version.git_rev[:10]} is damaged: DVC lists md5 {wanted.value}, the "
                f"file has {md5}: remove {wanted.value[:2]}/{wanted.value[2:]} from DVC's cache and `dvc fetch` it"
            )
        tree.add(tuple(name.split("/")), None, HashInfo(algorithm, md5))
    flush(files)
    tree.digest()
    if tree.oid != version.md5:
        raise DatasetError(
            f"{version.path} at commit {version.git_rev[:10]} is damaged: the pointer names md5 {version.md5}, the "
            f"files of DVC's listing have {tree.oid}: remove {version.md5[:2]}/{version.md5[2:]} from DVC's cache and "
            "`dvc fetch` it"
        )


def fetch_version(workspace: Workspace, watch: WatchSettings, version: DatasetVersion) -> Path:
    """`fetch` from the repository that has the version's commit: the one in use, the workspace, or the one it names.

    The version of a lineage may come from a repository that the settings do not name any more.

    Raises:
        DatasetError: as `fetch` and `data_root`.
    """
    cached = (workspace.cache / version.md5).is_dir()  # then no repository is asked, and none has to answer
    root = workspace.root if cached else _root_of(workspace, watch, version)
    return fetch(root, version, workspace.cache)


def check_stored(workspace: Workspace, watch: WatchSettings, version: DatasetVersion) -> None:
    """Fetch a version anew, from DVC's remote where one is set, hash it, and delete it. Only for who holds the
    workspace's lock.

    Raises:
        MissingDataError: the data is not there any more.
        DatasetError: it is not what the md5 says, or as `fetch` and `data_root`.
    """
    workspace.cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=workspace.cache) as scratch:
        fetch(_root_of(workspace, watch, version), version, Path(scratch), remote_only=True)


def scratch_folders(cache: Path) -> list[Path]:
    """Where data is fetched into that nobody keeps: left by killed processes, for who holds the workspace's lock."""
    return sorted(cache.glob(f"{_SCRATCH}*"))


def drop_copies(cache: Path, keep: Container[str]) -> int:
    """Delete fetched data but that with the md5s in `keep`, and what killed processes left half fetched. What a step
    still wants of it is fetched again. Only for who holds the workspace's lock.

    Returns:
        The bytes it took.
    """
    freed = 0
    for folder in scratch_folders(cache):
        freed += freed_bytes(folder)
        shutil.rmtree(folder)
    for folder in sorted(cache.glob("*.dir")) + sorted(cache.glob(".*.dir.partial")):
        md5 = folder.name.removeprefix(".").removesuffix(".partial")
        with locked(cache / f".{md5}.lock"):  # else somebody fetches into it
            if md5 not in keep or folder.name != md5:
                freed += freed_bytes(folder)
                shutil.rmtree(folder)
    return freed


def _root_of(workspace: Workspace, watch: WatchSettings, version: DatasetVersion) -> Path:
    in_use, named = _place(workspace, watch.repository), _place(workspace, version.repository)
    for root in (in_use, workspace.root, named):
        if _has(root, version.git_rev):
            return root
    return in_use if named == in_use else data_root(workspace, WatchSettings(repository=version.repository))


# --- the repository of the data


def data_root(workspace: Workspace, watch: WatchSettings, commit: str | None = None) -> Path:
    """The repository whose domains count: the workspace, or the one that `watch.repository` names.

    A path is read where it is. A URL has a clone in the workspace's cache, which has the remote's branches and tags
    under their own names, HEAD at the watched branch (without one at the remote's HEAD), and of the work tree only
    DVC's settings: so a revision means in a clone what it means in the other two. The clone is fetched each time,
    unless it has `commit`, and loses no commit when the remote's history is rewritten.

    Args:
        commit: full SHA of the only commit that is wanted.

    Raises:
        DatasetError: the remote does not answer, or has no such branch.
        GitError: git refuses.
    """
    root = _place(workspace, watch.repository)
    if watch.repository is None or not is_url(watch.repository) or (commit and _has(root, commit)):
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    with locked(root.with_name(f"{root.name}.lock")):
        _mirror(root, watch.repository, watch.branch)
    return root


def _place(workspace: Workspace, repository: str | None) -> Path:
    """The folder of a repository, which need not be there. A new password does not make a URL another repository."""
    if repository is None:
        return workspace.root
    if not is_url(repository):
        return workspace.root / repository
    digest = hashlib.sha256(without_secrets(repository).encode()).hexdigest()
    return workspace.cache / "repositories" / digest[:16]


def is_url(repository: str | None) -> bool:
    """Whether a repository is at a URL, and not at a path."""
    return repository is not None and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|[\w.-]+@[\w.-]+:", repository) is not None


def _has(root: Path, commit: str) -> bool:
    return (root / ".git").exists() and _find_commit(root, commit) == commit


def _mirror(root: Path, url: str, branch: str | None) -> None:
    """Bring the clone `root` up to date, or make it. What was killed in here, the next call completes."""
    shown = without_secrets(url)
    sparse = root / ".git" / "info" / "sparse-checkout"
    if not sparse.exists():
        root.mkdir(exist_ok=True)
        git(root, "init", "--quiet", "--template=")
        git(root, "config", "gc.pruneExpire", "never")  # a lineage may be made of commits that the remote dropped
        git(root, "config", "remote.origin.url", shown)
        git(root, "config", "core.sparseCheckout", "true")
        sparse.parent.mkdir(exist_ok=True)
        write_atomic(sparse, "/.dvc/\n")
    wanted = ["+refs/heads/*:refs/heads/*", "+refs/tags/*:refs/tags/*"]
    if branch is None:
        wanted.append(f"+HEAD:{_REMOTE_HEAD}")
    patience = ("-c", "http.lowSpeedLimit=1", "-c", "http.lowSpeedTime=60")  # of a remote that says nothing
    options = ("--quiet", "--prune", "--update-head-ok", "--no-write-fetch-head")
    done = run_git(root, *patience, "fetch", *options, url, *wanted)
    if done.returncode != 0:
        raise DatasetError(f"cannot fetch {shown}: {without_secrets(reason(done))}")
    tip = _find_commit(root, branch or _REMOTE_HEAD)
    if tip is None:
        raise DatasetError(f"{shown} has no branch {branch!r}: mend watch.branch")
    git(root, "checkout", "--quiet", "--force", "--detach", tip)


# --- a repository


def init_repository(root: Path) -> None:
    """Make `root` a git + DVC repository that ignores `.copal/`. What is there already stays; commits nothing, stages
    what it wrote.

    Raises:
        GitError: git refuses.
        DatasetError: DVC refuses.
    """
    root.mkdir(parents=True, exist_ok=True)
    if not (root / ".git").exists():
        git(root, "init", "--quiet", "--initial-branch=main")
    with _dvc_errors(f"DVC cannot set up {root}"):
        from dvc.repo import Repo

        dvc = Repo(str(root)) if (root / ".dvc").is_dir() else Repo.init(str(root))
        with dvc:
            if dvc.config["core"].get("analytics", True):
                with dvc.config.edit("repo") as config:
                    config["core"]["analytics"] = False
    ignored = root / ".gitignore"
    lines = ignored.read_text(encoding="utf-8").splitlines() if ignored.exists() else []
    if ".copal/" not in lines:
        write_atomic(ignored, "\n".join([*lines, ".copal/", ""]))
    _stage(root, ".gitignore", ".dvcignore", ".dvc/config", ".dvc/.gitignore")


def add_and_commit(root: Path, domain: str, message: str) -> str:
    """`dvc add data/<domain>` and commit its pointer with whatever else is staged; the SHA of HEAD afterwards.

    Makes no commit where nothing changed. Where git knows no identity the author is `copal <copal@localhost>`.

    Raises:
        GitError: git refuses.
        DatasetError: `root` is not the root of a git repository, or DVC refuses.
    """
    _git_root(root)
    with _dvc_errors(f"DVC cannot add data/{domain}"):
        from dvc.repo import Repo

        with Repo(str(root)) as dvc:
            dvc.add(str(root / "data" / domain))
    _stage(root, f"data/{domain}.dvc", "data/.gitignore")
    git_commit(root, message)
    return resolve_commit(root, "HEAD")


def _stage(root: Path, *paths: str) -> None:
    git(root, "add", "--", *(path for path in paths if (root / path).exists()))


# --- DVC


def _open_dvc(root: Path, commit: str, scratch: Path | None = None, remote_only: bool = False) -> Any:
    """The DVC repository as it is at `commit`, with the storage that is configured today.

    At an old commit the remote or the cache folder may not have been what it is now. Files are copied out of DVC's
    cache, never linked: a link would break, or change, with the cache. `scratch` takes DVC's index of the data, which
    otherwise lies in a database that all processes of the machine share, and that remembers damaged listings. With
    `remote_only` the cache is an empty folder in there, where the repository has a default remote.
    """
    from dvc.repo import Repo

    config: dict[str, Any] = {"core": {}, "cache": {"type": "copy"}}
    remote = None
    if (root / ".dvc").is_dir():  # else DVC would take the settings of a repository around this one
        with Repo(str(root)) as today:
            config["cache"]["dir"] = today.cache.local_cache_dir
            config["remote"] = dict(today.config["remote"])
            remote = today.config["core"].get("remote")
    if scratch is not None:
        config["core"]["site_cache_dir"] = str(scratch)
        if remote_only and remote:
            config["cache"]["dir"] = str(scratch / "cache")
    # uninitialized: the first pointer may have been committed before .dvc was.
    return Repo(str(root), rev=commit, uninitialized=True, config=config, remote=remote)


@contextmanager
def _dvc_errors(what: str) -> Iterator[None]:
    """Silence DVC's log, spinner and progress bars (they ask for the log level), and make one line of its errors."""
    from dvc.exceptions import DvcException
    from dvc.ui import ui

    ui.error_console.quiet = True
    for name in ("dvc", "dvc_objects", "dvc_data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    except DvcException as error:
        raise DatasetError(f"{what}: {_one_line(error)}") from error


def _one_line(error: BaseException | None) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# --- git


def _git_root(repo: Path) -> Path:
    if not repo.is_dir():
        raise DatasetError(f"{repo} is not a folder")
    found = run_git(repo, "rev-parse", "--show-toplevel")
    if found.returncode != 0:
        raise DatasetError(f"git cannot use {repo}: {reason(found)}")
    root = repo.resolve()
    if Path(found.stdout.rstrip("\n")).resolve() != root:
        raise DatasetError(f"{repo} is inside a git repository, but not its root: give {found.stdout.strip()}")
    return root


def _find_commit(root: Path, rev: str) -> str | None:
    found = run_git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{rev}^{{commit}}")
    return found.stdout.strip() if found.returncode == 0 else None


def _unknown_revision(root: Path, rev: str) -> DatasetError:
    return DatasetError(f"{rev!r} is not a commit, branch or tag of {root}")


def _repository(root: Path) -> str:
    found = run_git(root, "remote", "get-url", "origin")
    if found.returncode != 0:
        return str(root)
    return without_secrets(found.stdout.strip())
