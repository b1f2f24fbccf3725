"""What was fetched is kept within a bound, and what somebody uses is not taken from him."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows.cache import Cache, fetched_once

SIZE = 1000  # bytes of a folder


def fetched(cache: Cache, name: str, when: int) -> Path:
    """A folder of `SIZE` bytes in the cache, last used at second `when`."""

    def fetch(partial: Path) -> Path:
        (partial / "file").write_bytes(b"x" * SIZE)
        return partial

    target = fetched_once(cache.hold(name), fetch)
    os.utime(cache.folder / f".{name}.used", (when, when))
    return target


def there(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def test_what_was_used_least_recently_goes_first(tmp_path):
    for when, name in enumerate(("b", "a", "c")):
        fetched(Cache(tmp_path), name, when)
    Cache(tmp_path).hold("b")  # used anew, and let go
    cache = Cache(tmp_path, size=2.5 * SIZE / 1e9)
    cache.make_room()
    assert there(tmp_path) == ["b", "c"]
    cache.make_room()
    assert there(tmp_path) == ["b", "c"]


def test_nothing_goes_without_a_bound(tmp_path):
    fetched(Cache(tmp_path), "a", 0)
    Cache(tmp_path).make_room()
    assert there(tmp_path) == ["a"]


def test_what_is_held_stays_and_goes_once_it_is_let_go(tmp_path):
    user = Cache(tmp_path)
    fetched(user, "held", 0)
    fetched(Cache(tmp_path), "free", 1)
    small = Cache(tmp_path, size=1e-12)
    small.make_room()
    assert there(tmp_path) == ["held"]
    del user
    small.make_room()
    assert there(tmp_path) == []


@pytest.mark.parametrize("ends", [False, True], ids=["alive", "killed"])
def test_what_another_process_holds_stays_as_long_as_that_lives(tmp_path, ends):
    fetched(Cache(tmp_path), "a", 0)
    program = f"""
import sys
from pathlib import Path
from flows.cache import Cache
cache = Cache(Path({str(tmp_path)!r}))
cache.hold("a")
print("held", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        if ends:
            child.kill()
            child.wait()
        Cache(tmp_path, size=1e-12).make_room()
        assert there(tmp_path) == ([] if ends else ["a"])


def test_a_fetch_that_fails_leaves_nothing_and_a_killed_one_is_done_anew(tmp_path):
    def fails(partial: Path) -> Path:
        (partial / "half").write_text("half")
        raise OSError("the network is gone")

    with pytest.raises(OSError, match="gone"):
        fetched_once(tmp_path / "a", fails)
    assert there(tmp_path) == []
    (tmp_path / ".a.partial").mkdir()  # of a process that was killed
    (tmp_path / ".a.partial" / "half").write_text("half")
    assert [path.name for path in fetched(Cache(tmp_path), "a", 0).iterdir()] == ["file"]
    assert not (tmp_path / ".a.partial").exists()
