"""A domain's documents to seeded token windows; calibration and evaluation never share a document.

Letters in shapes: N windows, L tokens of a window.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from copal.config import CalibrationConfig
from copal.documents import Document, hash64, read_documents, split_documents
from copal.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["DomainWindows", "domain_windows"]

_FEWEST_WINDOWS = 8
_SLICE_CHARACTERS = 8  # of a slice, for each token of a window: about twice what English text needs to fill one


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DomainWindows:
    """The token windows of a domain, on the CPU.

    Attributes:
        calibration: (N, L), int64.
        evaluation: (N, L), int64, from documents that calibration never reads.
        calibration_documents: documents on that side, texts that are there twice counted once.
        evaluation_documents: likewise.
    """

    calibration: Tensor
    evaluation: Tensor
    calibration_documents: int
    evaluation_documents: int

    @property
    def calibration_digest(self) -> str:
        """SHA-256 (hexadecimal) of the calibration windows: their shape, then the tokens as little-endian int64."""
        return _digest(self.calibration)

    @property
    def evaluation_digest(self) -> str:
        """SHA-256 (hexadecimal) of the evaluation windows, likewise."""
        return _digest(self.evaluation)


def domain_windows(folder: Path, tokenizer: PreTrainedTokenizerBase, config: CalibrationConfig) -> DomainWindows:
    """Read the domain in `folder` and cut it into windows.

    A window is the tokenizer's BOS (where it has one), then pieces of documents with EOS between them (where it has
    one). Documents take turns in an order that the seed draws: in each round a document gives one piece of at most a
    window, starting at a place that the seed draws, the next round the piece after that, so one long document never
    fills every window. A piece that does not fit goes on in the next window. Only the documents whose turn comes are
    tokenised, and of a long one only slices of 8 L characters, cut where there is a space or a line break.

    Raises:
        DataError: a file cannot be read, or there is too little text on a side: fewer than 8 windows.
    """
    documents = read_documents(folder, text_field=config.text_field, id_field=config.id_field)
    calibration, evaluation = split_documents(documents, config.evaluation_share)
    cut = _Cutter(folder=folder, tokenizer=tokenizer, length=config.window_length, seed=config.seed)
    return DomainWindows(
        calibration=cut.windows("calibration", calibration, config.windows),
        evaluation=cut.windows("evaluation", evaluation, config.evaluation_windows),
        calibration_documents=len(calibration),
        evaluation_documents=len(evaluation),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Cutter:
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    length: int
    seed: int

    def windows(self, side: str, documents: Sequence[Document], most: int) -> Tensor:
        """At most `most` windows (N, L) of the documents of one side."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        start = [] if bos is None else [bos]
        joint = [] if eos is None else [eos]
        windows: list[list[int]] = []
        window = start.copy()
        tokens = 0
        for piece in self._pieces(documents):
            tokens += len(piece)
            if len(window) > len(start):
                window += joint
            window += piece
            while len(window) >= self.length and len(windows) < most:
                windows.append(window[: self.length])
                window = start + window[self.length :]
            if len(windows) == most:
                break
        fewest = min(_FEWEST_WINDOWS, most)
        if len(windows) < fewest:
            needed = fewest * (self.length - len(start))
            raise DataError(
                f"{self.folder} has {tokens} tokens in {len(documents)} documents for {side}, and {needed} are needed "
                f"({fewest} windows of {self.length}); add documents (each goes to one side as a whole) or lower "
                "calibration.window_length"
            )
        return torch.tensor(windows, dtype=torch.int64)

    def _pieces(self, documents: Sequence[Document]) -> Iterator[list[int]]:
        """The pieces of all documents, in rounds."""
        ordered = sorted(documents, key=lambda document: hash64(f"{self.seed}:order:{document.identity}"))
        waiting = [self._pieces_of(document) for document in ordered]
        while waiting:
            left = []
            for pieces in waiting:
                piece = next(pieces, None)
                if piece is not None:
                    yield piece
                    left.append(pieces)
            waiting = left

    def _pieces_of(self, document: Document) -> Iterator[list[int]]:
        """Pieces of one document: from a drawn place to its end, then from its start to that place."""
        payload = self.length - (self.tokenizer.bos_token_id is not None)
        cuts = list(_cuts(document.text, _SLICE_CHARACTERS * self.length))  # no copies: a text may be long
        slices = [slice(*ends) for ends in itertools.pairwise(cuts)]
        first = self._draw("slice", document, len(slices))
        opening = self._tokens(document.text[slices[first]])
        begin = self._draw("token", document, max(1, len(opening) - payload + 1))
        onwards = (self._tokens(document.text[part]) for part in slices[first + 1 :])
        back = (self._tokens(document.text[part]) for part in slices[:first])
        yield from _chop(itertools.chain([opening[begin:]], onwards), payload)
        yield from _chop(itertools.chain(back, [opening[:begin]]), payload)

    def _draw(self, what: str, document: Document, choices: int) -> int:
        return hash64(f"{self.seed}:{what}:{document.identity}") % choices

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
