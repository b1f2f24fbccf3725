from __future__ import annotations

from pathlib import Path

import pytest

from flows.data.dvc import init_repository
from flows.workspace import Workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    init_repository(tmp_path / "workspace")
    return Workspace(tmp_path / "workspace")
