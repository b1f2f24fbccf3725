"""A domain's documents to seeded token windows; calibration and evaluation never share a document.

Letters in shapes: N windows, L tokens of a window.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from copal.config import CalibrationConfig
from copal.documents import Document, hash64, read_documents, split_documents
from copal.errors import DataError
from copal.leakage import LeftOut, OtherText, Shingles, repeats, shingles_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["DomainWindows", "domain_windows", "text_read"]

_FEWEST_WINDOWS = 8
_BEGINNING = 1 << 14  # characters of a document that others are held against, beside the slice that was read first
_SLICE_CHARACTERS = 8  # of a slice, for each token of a window: about twice what English text needs to fill one


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DomainWindows:
    """The token windows of a domain, on the CPU.

    Attributes:
        calibration: (N, L), int64.
        evaluation: (N, L), int64, from documents that calibration never reads.
        calibration_documents: documents on that side, texts that are there twice counted once.
        evaluation_documents: likewise.
        repeated_documents: documents that were not counted, since another one has their text.
        left_out: documents that were passed over, since other domains have their text on the other side.
        calibration_text: the beginnings of the documents that were read, and the slices that were read first.
        evaluation_text: likewise.
    """

    calibration: Tensor
    evaluation: Tensor
    calibration_documents: int
    evaluation_documents: int
    repeated_documents: int
    left_out: LeftOut
    calibration_text: tuple[str, ...]
    evaluation_text: tuple[str, ...]

    @property
    def calibration_digest(self) -> str:
        """SHA-256 (hexadecimal) of the calibration windows: their shape, then the tokens as little-endian int64."""
        return _digest(self.calibration)

    @property
    def evaluation_digest(self) -> str:
        """SHA-256 (hexadecimal) of the evaluation windows, likewise."""
        return _digest(self.evaluation)


def domain_windows(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    config: CalibrationConfig,
    *,
    others: OtherText | None = None,
    left_out: LeftOut | None = None,
) -> DomainWindows:
    """Read the domain in `folder` and cut it into windows.

    A window is the tokenizer's BOS (where it has one), then pieces of documents with EOS between them (where it has
    one). Documents take turns in an order that the seed draws: in each round a document gives one piece of at most a
    window, starting at a place that the seed draws, the next round the piece after that, so one long document never
    fills every window. A piece that does not fit goes on in the next window. Only the documents whose turn comes are
    tokenised, and of a long one only slices of 8 L characters, cut where there is a space or a line break.

    Args:
        others: what other domains read. A document that repeats text of theirs from the other side is
            passed over (`copal.leakage`).
        left_out: pass over these instead, which `others` left out when the domain was cut first: so its windows stay
            the same whatever domains come and go.

    Raises:
        DataError: a file cannot be read, there is too little text on a side (fewer than 8 windows), or more than
            `calibration.overlap_limit` of the documents that were looked at had to be passed over.
    """
    documents = read_documents(folder, text_field=config.text_field, id_field=config.id_field)
    calibration, evaluation = split_documents(documents, config.evaluation_share)
    others = others or OtherText()
    one, two = (
        _Side(
            name=name,
            documents=side,
            most=most,
            repeated=repeated,
            passed=None if left_out is None else frozenset(getattr(left_out, name)),
        )
        for name, side, most, repeated in (
            ("calibration", calibration, config.windows, others.evaluation),
            ("evaluation", evaluation, config.evaluation_windows, others.calibration),
        )
    )
    cut = _Cutter(folder=folder, tokenizer=tokenizer, config=config)
    return DomainWindows(
        calibration=cut.windows(one),
        evaluation=cut.windows(two),
        calibration_documents=len(calibration),
        evaluation_documents=len(evaluation),
        repeated_documents=len(documents) - len(calibration) - len(evaluation),
        left_out=LeftOut(calibration=tuple(sorted(one.left_out)), evaluation=tuple(sorted(two.left_out))),
        calibration_text=tuple(one.text),
        evaluation_text=tuple(two.text),
    )


def text_read(domains: Collection[DomainWindows]) -> OtherText:
    """What domains read for their windows, for a domain that is cut after them."""
    return OtherText(
        calibration=shingles_of(itertools.chain.from_iterable(domain.calibration_text for domain in domains)),
        evaluation=shingles_of(itertools.chain.from_iterable(domain.evaluation_text for domain in domains)),
    )


@dataclass(kw_only=True, slots=True)
class _Side:
    """The documents of one side of a domain, and which of them are passed over.

    Attributes:
        most: windows that are cut of it.
        repeated: what its documents must not repeat.
        passed: the documents that are passed over, if that is known already.
        looked_at: how many documents had their turn.
        left_out: those that were passed over, by the hashes of their identities.
        text: what other domains must not repeat: how the others begin, and the slices that were read first.
    """

    name: str
    documents: Sequence[Document]
    most: int
    repeated: Shingles
    passed: frozenset[str] | None
    looked_at: int = 0
    left_out: list[str] = field(default_factory=list)
    text: list[str] = field(default_factory=list)

    def passes_over(self, document: Document) -> bool:
        """Whether the document, whose turn it is, gives no windows."""
        self.looked_at += 1
        name = f"{hash64(document.identity):016x}"
        out = repeats(document.text, self.repeated) if self.passed is None else name in self.passed
        if out:
            self.left_out.append(name)
        else:
            self.text.append(document.text[:_BEGINNING])
        return out


@dataclass(frozen=True, kw_only=True, slots=True)
class _Cutter:
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    config: CalibrationConfig

    def windows(self, side: _Side) -> Tensor:
        """At most `most` windows (N, L) of the documents of one side."""
        length, most = self.config.window_length, side.most
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        start = [] if bos is None else [bos]
        joint = [] if eos is None else [eos]
        windows: list[list[int]] = []
        window = start.copy()
        tokens = 0
        for piece in self._pieces(side):
            tokens += len(piece)
            if len(window) > len(start):
                window += joint
            window += piece
            while len(window) >= length and len(windows) < most:
                windows.append(window[:length])
                window = start + window[length:]
            if len(windows) == most:
                break
        self._check_overlap(side)
        fewest = min(_FEWEST_WINDOWS, most)
        if len(windows) < fewest:
            needed = fewest * (length - len(start))
            raise DataError(
                f"{self.folder} has {tokens} tokens in {len(side.documents)} documents for {side.name}, and {needed} "
                f"are needed ({fewest} windows of {length}); add documents (each goes to one side as a whole) or lower "
                "calibration.window_length"
            )
        return torch.tensor(windows, dtype=torch.int64)

    def _check_overlap(self, side: _Side) -> None:
        share, limit = len(side.left_out) / max(1, side.looked_at), self.config.overlap_limit
        if side.passed is None and share > limit:
            other = "evaluation" if side.name == "calibration" else "calibration"
            raise DataError(
                f"{self.folder}: {len(side.left_out)} of {side.looked_at} documents for {side.name} repeat what "
                f"other domains have for {other}, more than calibration.overlap_limit ({limit:g}) allows: take "
                "them out, give the same documents the same id in each domain (they are on the same side then), or "
                "raise the limit"
            )

    def _pieces(self, side: _Side) -> Iterator[list[int]]:
        """The pieces of all documents, in rounds."""
        seed = self.config.seed
        ordered = sorted(side.documents, key=lambda document: hash64(f"{seed}:order:{document.identity}"))
        waiting = [self._pieces_of(document, side) for document in ordered]
        while waiting:
            left = []
            for pieces in waiting:
                piece = next(pieces, None)
                if piece is not None:
                    yield piece
                    left.append(pieces)
            waiting = left

    def _pieces_of(self, document: Document, side: _Side) -> Iterator[list[int]]:
        """Pieces of one document: from a drawn place to its end, then from its start to that place."""
        if side.passes_over(document):
            return
        length = self.config.window_length
        payload = length - (self.tokenizer.bos_token_id is not None)
        cuts = list(_cuts(document.text, _SLICE_CHARACTERS * length))  # no copies: a text may be long
        slices = [slice(*ends) for ends in itertools.pairwise(cuts)]
        first = self._draw("slice", document, len(slices))
        opening = self._tokens(document.text[slices[first]])
        side.text.append(document.text[slices[first]])
        begin = self._draw("token", document, max(1, len(opening) - payload + 1))
        onwards = (self._tokens(document.text[part]) for part in slices[first + 1 :])
        back = (self._tokens(document.text[part]) for part in slices[:first])
        yield from _chop(itertools.chain([opening[begin:]], onwards), payload)
        yield from _chop(itertools.chain(back, [opening[:begin]]), payload)

    def _draw(self, what: str, document: Document, choices: int) -> int:
        return hash64(f"{self.config.seed}:{what}:{document.identity}") % choices

    def _tokens(self, text: str) -> list[int]:
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return tokens


def _cuts(text: str, size: int) -> Iterator[int]:
    """Where to cut text into slices of at most `size` characters, before a space or line break where there is one:
    the start of each slice, and the end of the text."""
    start = 0
    while start < len(text):
        yield start
        end = start + size
        if end < len(text):
            end = max(text.rfind("\n", start + 1, end), text.rfind(" ", start + 1, end))
            if end < 0:
                end = start + size
        start = end
    yield len(text)


def _chop(runs: Iterable[list[int]], size: int) -> Iterator[list[int]]:
    """Pieces of `size` tokens (the last may be shorter) of runs of tokens that follow one another."""
    rest: list[int] = []
    for run in runs:
        rest += run
        while len(rest) >= size:
            yield rest[:size]
            rest = rest[size:]
    if rest:
        yield rest


def _digest(windows: Tensor) -> str:
    digest = hashlib.sha256(f"{tuple(windows.shape)}".encode())
    digest.update(windows.numpy().astype("<i8").tobytes())
    return digest.hexdigest()
