"""Leakage between domains: text that calibrates one domain and evaluates another would make figures too good.

What other domains read for their windows is known by shingles (Broder 1997): all stretches of 50 characters of the
normalised text, as 64-bit hashes, of which every fourth value is kept. A document repeats it where at least half of its
own shingles are among those, or 250 of them, which are some 1,000 characters. The rule is ours; contamination of
evaluation sets is counted by n-gram overlap in the same way (Chowdhery et al. 2022, PaLM, arXiv 2204.02311, section 8).
Characters and not words, so that it holds for languages without spaces. Documents of fewer than 50 characters repeat
nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from copal.documents import normalised

__all__ = ["LeftOut", "OtherText", "Shingles", "repeats", "shingles_of"]

Shingles = NDArray[np.uint64]  # sorted, each once

_LENGTH = 50  # characters of a shingle
_KEPT = 4  # one hash of so many
_SHARE, _MANY = 0.5, 250  # of a document's shingles, from which on it repeats others
_FACTOR = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64


@dataclass(frozen=True, kw_only=True, slots=True)
class LeftOut:
    """Documents of a domain that were passed over on one side, since another domain has their text on the other.

    Attributes:
        calibration, evaluation: the hashes of their identities (`copal.documents.hash64`, hexadecimal), by side.
    """

    calibration: tuple[str, ...] = ()
    evaluation: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.calibration) + len(self.evaluation)


def _nothing() -> Shingles:
    return np.empty(0, dtype=np.uint64)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class OtherText:
    """What other domains read for their windows, by side."""

    calibration: Shingles = field(default_factory=_nothing)
    evaluation: Shingles = field(default_factory=_nothing)


def shingles_of(texts: Iterable[str]) -> Shingles:
    """The shingles of texts."""
    found = [part for text in texts for part in _shingles(text)]
    return np.unique(np.concatenate(found)) if found else _nothing()


def repeats(text: str, known: Shingles) -> bool:
    """Whether a document's text repeats what is known, by the rule above."""
    if not known.size:
        return False
    own = shared = 0
    for part in _shingles(text):
        own += part.size
        shared += int((known[np.searchsorted(known[:-1], part)] == part).sum())
    return shared > 0 and shared >= min(_SHARE * own, _MANY)


def _shingles(text: str) -> Iterable[Shingles]:
    """The shingles of a text, piece by piece: sum_j c_j F^j over 50 characters c, modulo 2^64, then mixed."""
    for piece in normalised(text):
        letters = np.frombuffer(piece.encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
        if letters.size < _LENGTH:
            continue
        sums = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(letters * _powers(_FACTOR, letters.size))])
        count = letters.size - _LENGTH + 1
        hashes = (sums[_LENGTH:] - sums[:count]) * _powers(pow(_FACTOR, -1, 2**64), count)
        hashes ^= hashes >> np.uint64(29)
        hashes *= np.uint64(0xBF58476D1CE4E5B9)
        hashes ^= hashes >> np.uint64(32)
        yield hashes[hashes % np.uint64(_KEPT) == 0]


def _powers(factor: int, count: int) -> Any:
    """1, F, F^2, ... modulo 2^64."""
    factors = np.full(count, factor, dtype=np.uint64)
    factors[0] = 1
    return np.cumprod(factors)
