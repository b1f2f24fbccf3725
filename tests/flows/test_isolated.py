"""A repository with packages of its own that are called `flows` and `copal`: what copal starts imports neither."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import flows
from flows.data.git import git
from flows.isolated import isolated_environment, isolated_python

RAISES = "raise SystemExit('imported what lies in the repository')\n"


@pytest.fixture
def collided(bench, monkeypatch):
    """A workspace whose repository tracks packages `flows` and `copal` that nobody can import."""
    for name in ("flows", "copal"):
        (bench.root / name).mkdir()
        (bench.root / name / "__init__.py").write_text(RAISES)
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "somebody")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "somebody@localhost")
    git(bench.root, "add", "flows", "copal")
    git(bench.root, "commit", "--quiet", "--message", "Packages of our own")
    return bench


@pytest.fixture
def copal(collided, monkeypatch) -> Callable[..., subprocess.CompletedProcess[str]]:
    """copal(*arguments) -> what the command, as the installed script runs it, does in that workspace."""
    monkeypatch.setenv("PYTHONPATH", str(Path(flows.__file__).parents[1]))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-P", "-m", "flows.cli", *arguments],
            cwd=collided.root,
            capture_output=True,
            text=True,
            check=False,
            timeout=400,
        )

    return run


def test_the_packages_are_found_where_nothing_guards_against_them(collided):
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "status"],
        cwd=collided.root,
        env={name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "imported what lies in the repository" in done.stderr


def test_the_children_of_an_isolated_process_are_isolated_and_run_the_same_copal(collided):
    program = "import subprocess, sys; print(subprocess.run([sys.executable, '-c', sys.argv[1]], check=True) and '')"
    child = "import copal, flows; print(copal.__file__, flows.__file__)"
    (collided.root / "program.py").write_text(program)
    command = isolated_python("runpy_of_nobody")
    assert command == [sys.executable, "-P", "-m", "runpy_of_nobody"]
    done = subprocess.run(
        [sys.executable, "-P", "program.py", child],
        cwd=collided.root,
        env=isolated_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    home = Path(flows.__file__).parents[1]
    assert done.stdout.split() == [str(home / "copal" / "__init__.py"), flows.__file__]


@pytest.mark.parametrize(
    ("place", "before", "after"),
    [
        ("/checkout", "/somewhere", "/checkout:/somewhere"),
        ("/checkout", None, "/checkout"),
        ("/checkout", "/somewhere:/checkout", "/somewhere:/checkout"),
        ("/venv/lib/python3.11/site-packages", "/somewhere", "/somewhere"),
        ("/venv/lib/python3.11/site-packages", None, None),
    ],
)
def test_pythonpath_stays_and_a_checkout_is_added(monkeypatch, place, before, after):
    monkeypatch.setattr("flows.isolated.__file__", f"{place}/flows/isolated.py")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    if before is not None:
        monkeypatch.setenv("PYTHONPATH", before)
    assert isolated_environment().get("PYTHONPATH") == after
    assert isolated_environment()["PYTHONSAFEPATH"] == "1"


@pytest.mark.team
def test_a_step_runs_in_such_a_repository(collided, copal):
    collided.set("name: tiny", "name: tiny, processes: 2")  # which are started too
    collided.commit("code", 0)
    done = copal("watch", "--once")
    assert done.returncode == 0, done.stderr
    assert "version 2 of tiny: adapted to code\n" in done.stdout
    done = copal("status", "--json")
    assert [version["domain"] for version in json.loads(done.stdout)["versions"]] == [None, "code"], done.stderr


def test_the_hook_runs_in_such_a_repository(collided, copal, monkeypatch, tmp_path):
    """The hook is silent: what it would say, a `sitecustomize` of its Python writes down."""
    assert copal("hook", "install").returncode == 0
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os, sys\n"
        "def tell():\n"
        "    if 'notify' in sys.argv:\n"
        "        there = sys.modules.get('flows')\n"
        f"        with open({str(tmp_path / 'told')!r}, 'a') as file:\n"
        "            print(getattr(there, '__file__', None), flush=True, file=file)\n"
        "atexit.register(tell)\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), os.environ["PYTHONPATH"])))
    collided.commit("code", 0)
    told, pause = tmp_path / "told", threading.Event()
    for _ in range(300):
        if told.exists() and told.read_text().endswith("\n"):
            break
        pause.wait(0.1)
    assert told.read_text() == f"{flows.__file__}\n"
