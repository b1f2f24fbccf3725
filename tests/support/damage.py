"""What others may have done to a file: to its bytes, and to the values in it."""

from __future__ import annotations

import copy
import gc
import random
import resource
import time
from collections.abc import Callable
from typing import Any

import pytest

from copal.errors import CopalError

FEW_AND_MANY = pytest.mark.parametrize(
    "count", [300, pytest.param(100_000, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])]
)

_SECONDS, _MEGABYTES = 1.0, 256  # that a hostile input may take


def damaged(content: bytes, drawn: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(drawn.randint(1, 3)):
        place, kind = drawn.randrange(len(changed)), drawn.randrange(5)
        if kind == 0:
            changed[place] = drawn.randrange(256)
        elif kind == 1:
            changed[place] ^= 1 << drawn.randrange(8)
        elif kind == 2:
            del changed[place : place + drawn.randint(1, 9)]
        elif kind == 3:
            changed[place:place] = drawn.randbytes(drawn.randint(1, 9))
        else:
            changed[place:place] = changed[place : place + drawn.randint(1, 50)]
    return bytes(changed)


def _deep(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def altered(value: Any, drawn: random.Random) -> Any:
    """A copy of a JSON value in which a part or two is of another type, gone, renamed, too large or too deep."""
    made = {"": copy.deepcopy(value)}
    for _ in range(drawn.randint(1, 2)):
        place, inside = "", made
        while isinstance(inside[place], (dict, list)) and inside[place] and drawn.random() < 0.8:
            inside = inside[place]
            place = drawn.choice(list(inside)) if isinstance(inside, dict) else drawn.randrange(len(inside))
        kind = drawn.randrange(9)
        if kind == 0 and inside is not made:
            del inside[place]
            continue
        if kind == 1 and isinstance(inside, dict) and inside is not made:
            inside[drawn.choice(["", "é\x1b[31m", "x" * 5000, place + " "])] = inside.pop(place)
            continue
        odd = [None, True, -1, 0, 10**400, 1e308, -0.5, [], {}, _deep(50), _deep(900), [0] * 1000, "nan", "1:2", ".."]
        odd += [
            "\x1b]0;x\x07\u202e",
            "/etc/passwd",
            "a\nb",
            "x" * 5000,
            "2030-01-01",
            [inside[place]],
            {"x": inside[place]},
        ]
        inside[place] = drawn.choice(odd)
    return made[""]


def survives(read: Callable[[], object], error: type[CopalError] = CopalError) -> str:
    """What `read` says in refusing, "" where it does not: in one line for a terminal, and within a second of work."""
    began = time.thread_time()  # threads that other tests left do not count
    try:
        read()
        said = ""
    except error as refusal:
        said = str(refusal)
        assert said.isprintable(), said
        assert 0 < len(said) < 20_000
    assert time.thread_time() - began < _SECONDS
    return said


class MemoryBound:
    """`with MemoryBound():` what is done inside takes at most 256 MB more than there was.

    What is alive before is out of the garbage collector's sight meanwhile: to walk through all that a long run of tests
    has imported takes a second, and would be put down to the input that happened to begin it.
    """

    def __enter__(self) -> None:
        gc.collect()
        gc.freeze()
        self._before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def __exit__(self, *_: object) -> None:
        gc.unfreeze()
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self._before
        assert grown < _MEGABYTES << 10
