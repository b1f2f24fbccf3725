"""The tests themselves: what they share lies in tests/support, so that each file can be read, moved and run alone."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILES = sorted(path for path in TESTS.rglob("*.py") if path.parent != TESTS / "bench")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(TESTS)))
def test_no_test_is_imported(path: Path) -> None:
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    parts = {part for name in imported for part in name.split(".")}
    assert not {part for part in parts if part.startswith("test_") or part in ("tests", "conftest")}


def test_rooms_of_tests_are_those_of_the_code() -> None:
    code = {path.name for path in (TESTS.parent / "flows").iterdir() if (path / "__init__.py").exists()}
    assert {path.name for path in (TESTS / "flows").iterdir() if path.is_dir() and path.name[0] != "_"} == code


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="the tests run in one process")
def test_tests_of_a_file_run_in_one_process(request: pytest.FixtureRequest) -> None:
    """Where pytest-xdist does not see the groups, what a file shares is made in each process: minutes more."""
    assert request.node.nodeid.endswith("@tests/test_tests.py")
