"""Files of versions that somebody altered, cut or put in the place of others: verify names them, no step uses them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from copal.errors import CopalError
from flows.verification.verify import verify
from support.toys import step


@pytest.fixture(scope="module")
def three(make_bench, tmp_path_factory):
    """Versions 2 (code) and 3 (legal) on the base, and data of a third domain that is pending."""
    bench = make_bench(tmp_path_factory.mktemp("tampering") / "workspace")
    for seed, domain in enumerate(("code", "legal")):
        bench.commit(domain, seed)
        step(bench, domain)
    bench.commit("prose", 2)
    return bench


def folder(bench, number: int) -> Path:
    return bench.registry.folder(bench.registry.version(number))


def shard(bench, number: int, part: str) -> Path:
    return sorted((folder(bench, number) / part).glob("*.safetensors"))[:2][-1]  # of a version the first has no linears


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-64])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(content)


def swap(one: Path, other: Path) -> None:
    held = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(held)


def older_state(bench) -> None:
    shutil.rmtree(folder(bench, 3) / "state")
    shutil.copytree(folder(bench, 2) / "state", folder(bench, 3) / "state")


TAMPERING: dict[str, tuple[Callable, str]] = {
    "weights of the head cut": (lambda bench: cut(shard(bench, 3, "model")), "model/"),
    "a bit of the head's weights": (lambda bench: flip(shard(bench, 3, "model")), "model/"),
    "a bit of the base's weights": (lambda bench: flip(shard(bench, 1, "model")), "model/"),
    "weights of two versions swapped": (
        lambda bench: swap(shard(bench, 2, "model"), shard(bench, 3, "model")),
        "model/",
    ),
    "a bit of the sum": (lambda bench: flip(shard(bench, 3, "state/sum")), "state/sum"),
    "sums of two versions swapped": (
        lambda bench: swap(shard(bench, 2, "state/sum"), shard(bench, 3, "state/sum")),
        "state/sum",
    ),
    "an older state beside newer weights": (older_state, "state/manifest.json"),
    "an edited record": (lambda bench: flip(folder(bench, 3) / "lineage.json"), "lineage.json"),
    "a record that is gone": (lambda bench: (folder(bench, 3) / "lineage.json").unlink(), "lineage.json"),
}


@pytest.mark.parametrize("what", TAMPERING)
def test_what_was_tampered_with_is_named_by_verify_and_used_by_no_step(three, tmp_path, what):
    alter, names = TAMPERING[what]
    shutil.copytree(three.workspace.artifacts, tmp_path / "whole")
    base = what.startswith("a bit of the base")
    try:
        alter(three)
        found = verify(three.project, three.registry.version(1 if base else 3), data=False).findings
        assert any(names in line for line in found), found
        with pytest.raises(CopalError, match=names) as caught:
            step(three, "prose")
        assert str(caught.value).isprintable()
        assert len(three.registry.versions()) == 3
    finally:
        shutil.rmtree(three.workspace.artifacts)
        shutil.copytree(tmp_path / "whole", three.workspace.artifacts)


def test_what_was_put_back_is_used_again(three):
    assert step(three, "prose").number == 4
