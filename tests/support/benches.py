"""Workspaces with real git and DVC repositories and a real MLflow database, and the text that is put into them."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from copal.base import base_fingerprint
from flows.data.dvc import add_and_commit
from flows.models.base import BaseModel
from flows.params import load_settings
from flows.project import Project, open_project, read_log
from flows.registry.registry import Registry
from flows.settings import Settings
from flows.step.register import register_root
from flows.workspace import Workspace

PARAMS = """
model: {name: tiny, dtype: float32}
calibration: {window_length: 32, windows: 8, evaluation_windows: 8, evaluation_share: 0.4}
prune: {iterations: 30}
registry: {pictures: false}
"""


class Bench:
    """A workspace and what a user does in it."""

    def __init__(self, workspace: Workspace, base: Path) -> None:
        self.workspace, self.base = workspace, base
        self.root = workspace.root

    @property
    def settings(self) -> Settings:
        return load_settings(self.workspace.params)

    @property
    def project(self) -> Project:
        """Opened anew each time: it sees what others did in between."""
        return open_project(self.root)

    @property
    def log(self) -> list[dict]:
        """The log as it is now, checked."""
        return read_log(self.project)

    @property
    def registry(self) -> Registry:
        return self.project.registry

    def write(self, domain: str, seed: int, documents: int = 24) -> None:
        """Put made-up text into data/`domain`; each seed speaks another dialect."""
        folder = self.root / "data" / domain
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"id": f"{domain}-{number}", "text": text(seed, number)}) for number in range(documents)]
        (folder / "documents.jsonl").write_text("\n".join(lines) + "\n")

    def commit(self, domain: str, seed: int, documents: int = 24) -> str:
        """A new version of `domain`: written, tracked by DVC and committed."""
        self.write(domain, seed, documents)
        return self.track(domain)

    def track(self, domain: str) -> str:
        """Track data/`domain` as it lies there, and commit."""
        return add_and_commit(self.root, domain, f"Add {domain}")

    def set(self, old: str, new: str) -> None:
        """Edit params.yaml."""
        params = self.workspace.params.read_text()
        assert old in params
        self.workspace.params.write_text(params.replace(old, new))

    def lose_data(self) -> None:
        """Delete DVC's cache; there is no remote."""
        shutil.rmtree(self.root / ".dvc" / "cache")

    def register_root(self) -> None:
        """Register the tiny base under the name in params.yaml."""
        base = BaseModel(folder=self.base, fingerprint=base_fingerprint(self.base), source="tiny")
        register_root(self.project, base)

    def snapshot(self) -> dict[str, str]:
        """What must not change when input is refused: every file but caches and the lock, by its hash."""
        ignored = (
            ".copal/cache",
            ".copal/lock",
            ".dvc/tmp",
            ".dvc/cache",
            ".git",
            ".copal/mlflow.db",
            ".copal/ledger.db",
        )
        files = (path for path in sorted(self.root.rglob("*")) if path.is_file())
        named = ((path, path.relative_to(self.root).as_posix()) for path in files)
        return {
            name: hashlib.sha256(path.read_bytes()).hexdigest() for path, name in named if not name.startswith(ignored)
        }


def text(seed: int, number: int) -> str:
    """200 characters of a dialect: each seed favours other letters."""
    digest = hashlib.sha256(f"{seed}/{number}".encode()).hexdigest()
    letters = hashlib.sha256(str(seed).encode()).hexdigest()[:8] + " "
    return "".join(letters[int(digit, 16) % len(letters)] for digit in digest * 3) + f" {number}"


def sentence(language: int, number: int) -> str:
    """Some 200 characters in one of the languages that `learnt_base` knows: eight words each."""
    words = [hashlib.sha256(f"{language}/{word}".encode()).hexdigest()[:4] for word in range(8)]
    drawn = hashlib.sha256(f"{language}/{number}".encode()).hexdigest()
    return " ".join(words[int(digit, 16) % len(words)] for digit in drawn[:40]) + f" {number}"


def copy_workspace(root: Path, target: Path) -> None:
    """Put a copy of the workspace `root` in the place of what is at `target`.

    A copy that is put back to where the workspace was is used by a test whose module asks for `exchanged_files`.
    """
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(root, target, symlinks=True)
