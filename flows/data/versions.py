"""Which dataset versions a repository has at a commit, in the order in which their pointers last changed.

A *domain* is a folder directly under `data/` that DVC tracks, with a `.dvc` pointer or as the output of a stage in
`dvc.lock`. A *dataset version* is its md5 at a commit. A tracked file (`data/x.jsonl`) is no domain, nor is a stage's
output before its first `dvc repro` (it has no md5). The work tree is not touched.
"""

from __future__ import annotations

import functools
import os
import posixpath
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from copal.bounded import check_bounds
from flows.data.commits import find_commit, git_root, unknown_revision
from flows.data.dataset import DatasetError, DatasetVersion
from flows.data.dvc import dvc_errors, open_pointers
from flows.data.git import git, run_git, start_git
from flows.uris import without_secrets

__all__ = [
    "dataset_version",
    "dataset_versions",
    "untracked",
]


_LARGEST = 1 << 20  # bytes of a pointer; that of a folder has 100, a dvc.lock of hundreds of stages 100,000


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pointer:
    domain: str
    md5: str
    file: str  # path in git of the .dvc file or of dvc.lock
    output: str  # how that file spells the output


def dataset_versions(repo: Path, rev: str = "HEAD") -> list[DatasetVersion]:
    """The version of every domain at a commit, in the order in which the pointers last changed in git history.

    Oldest first, by topological order; pointers that changed in one commit by name. An older md5 that comes back
    (A, B, A) changed last when it came back. A repository without commits has no versions. In a shallow clone, what
    changed before the cut counts as changed at the cut.

    Raises:
        DatasetError: `repo` is not the root of a git repository, `rev` is unknown, or DVC cannot read a pointer.
    """
    root = git_root(repo)
    commit = find_commit(root, rev)
    if commit is None:
        if rev == "HEAD":
            return []
        raise unknown_revision(root, rev)
    pointers = _pointers(root, commit)
    if not pointers:
        return []
    with _tracked_reader(root) as tracked:
        changes = [(pointer, _last_change(root, commit, pointer, tracked)) for pointer in pointers]
    order = {sha: place for place, sha in enumerate(git(root, "rev-list", "--topo-order", "--reverse", commit).split())}
    repository = repository_url(root)
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


def untracked(root: Path) -> list[str]:
    """What lies in `data/` of a work tree and is neither tracked by DVC, nor one file that git tracks; sorted names.

    Raises:
        GitError: git refuses.
    """
    kept = set(git(root, "ls-files", "--", "data").split("\n"))
    ignored = (root / "data" / ".gitignore").read_text().split() if (root / "data" / ".gitignore").is_file() else []
    return sorted(
        path.name
        for path in (root / "data").glob("[!.]*")
        if f"/{path.name}" not in ignored and path.suffix != ".dvc" and f"data/{path.name}" not in kept
    )


def _pointers(root: Path, commit: str) -> list[_Pointer]:
    where = f"{root} at {commit[:10]}"
    with (
        TemporaryDirectory() as scratch,
        dvc_errors(f"DVC cannot read {where}"),
        open_pointers(root, commit, Path(scratch)) as dvc,
    ):
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

    if len(content) > _LARGEST:
        return frozenset()
    try:
        parsed = yaml.load(content, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        check_bounds(parsed, "the pointer", DatasetError)
    except (yaml.YAMLError, ValueError, RecursionError, DatasetError):
        return frozenset()
    if not isinstance(parsed, dict):
        return frozenset()
    stages = parsed.get("stages")
    entries = stages.values() if isinstance(stages, dict) else [parsed]
    lists = [entry.get("outs") for entry in entries if isinstance(entry, dict)]
    outputs = [output for outs in lists if isinstance(outs, list) for output in outs if isinstance(output, dict)]
    return frozenset((str(output.get("path")), str(output.get("md5"))) for output in outputs)


def repository_url(root: Path) -> str:
    found = run_git(root, "config", "--get", "remote.origin.url")  # as it is written: not as this machine reads it
    if found.returncode != 0:
        return str(root)
    return without_secrets(found.stdout.strip())
