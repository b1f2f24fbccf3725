"""A DVC remote on S3: data comes from there, and is waited for while the store is away."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.data.dataset import DatasetVersion, MissingDataError
from flows.data.dvc import add_and_commit, init_repository
from flows.data.fetch import fetch
from flows.data.versions import dataset_version
from support.buckets import S3Server


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    server = S3Server()
    for name, value in {**server.environment, "AWS_MAX_ATTEMPTS": "1"}.items():
        monkeypatch.setenv(name, value)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def repository(tmp_path: Path, s3: S3Server) -> Path:
    """The domain legal, whose data is on S3 alone."""
    from dvc.repo import Repo

    s3.new_bucket("copal-data")
    root = tmp_path / "repository"
    init_repository(root)
    remote = "[core]\n    remote = store\n['remote \"store\"']\n    url = s3://copal-data/team\n"
    (root / ".dvc" / "config").write_text(remote)
    (root / "data" / "legal").mkdir(parents=True)
    (root / "data" / "legal" / "text.txt").write_text("legal")
    add_and_commit(root, "legal", "Add legal")
    with Repo(str(root)) as dvc:
        dvc.push()
    shutil.rmtree(root / ".dvc" / "cache")
    return root


def version_of(repository: Path) -> DatasetVersion:
    return dataset_version(repository, "legal", "HEAD")


def test_data_comes_from_s3(repository: Path, tmp_path: Path) -> None:
    folder = fetch(repository, version_of(repository), tmp_path / "fetched")
    assert (folder / "text.txt").read_text() == "legal"


def test_while_s3_is_away_data_is_missing_and_not_refused(repository: Path, s3: S3Server, tmp_path: Path) -> None:
    version = version_of(repository)
    s3.kill()
    with pytest.raises(MissingDataError) as caught:
        fetch(repository, version, tmp_path / "fetched")
    assert "nor on a remote that answers (Could not connect to the endpoint" in str(caught.value)
    assert str(caught.value).isprintable()
    s3.start()
    assert (fetch(repository, version, tmp_path / "fetched") / "text.txt").read_text() == "legal"


def test_data_that_we_are_not_let_to_is_missing(repository: Path, tmp_path: Path, monkeypatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(MissingDataError, match="Unable to locate credentials"):
        fetch(repository, version_of(repository), tmp_path / "fetched")
