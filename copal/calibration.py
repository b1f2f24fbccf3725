"""Domain text to seeded token windows; calibration and evaluation never share a document.

Letters in shapes: N windows, L tokens of a window.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from copal.config import CalibrationConfig
from copal.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Document", "DomainWindows", "domain_windows", "read_documents", "split_documents"]

_FEWEST_WINDOWS = 8
_SLICE_CHARACTERS = 8  # of a slice, for each token of a window: about twice what English text needs to fill one


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One document of a domain.

    Attributes:
        identity: `id:` and the row's `id`, else `path:` and the file's place in the domain's folder, with `#` and the
            row's number (from 1) where a file holds many. Decides the document's side and its place in line.
        text: never empty.
    """

    identity: str
    text: str


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
    calibration, evaluation = split_documents(read_documents(folder), config.evaluation_share)
    cut = _Cutter(folder=folder, tokenizer=tokenizer, length=config.window_length, seed=config.seed)
    return DomainWindows(
        calibration=cut.windows("calibration", calibration, config.windows),
        evaluation=cut.windows("evaluation", evaluation, config.evaluation_windows),
        calibration_documents=len(calibration),
        evaluation_documents=len(evaluation),
    )


def split_documents(documents: Iterable[Document], evaluation_share: float) -> tuple[list[Document], list[Document]]:
    """Share documents out to (calibration, evaluation), each side in the order of the hash of the identity.

    The first 8 bytes of SHA-256(identity), as a fraction of 2^64, are below `evaluation_share` for evaluation. So a
    document's side depends on nothing but its identity, and an edited or added document makes no other one change
    sides. Texts that are the same after NFKC, case folding and collapsing of white space count once, under the identity
    with the smallest hash: if any of them is evaluation text, the text is kept from calibration.
    """
    kept: dict[bytes, tuple[int, str, Document]] = {}
    for document in documents:
        normalised = " ".join(unicodedata.normalize("NFKC", document.text).casefold().split())
        key = hashlib.sha256(normalised.encode()).digest()
        entry = (_hash64(document.identity), document.text, document)
        if key not in kept or entry[:2] < kept[key][:2]:
            kept[key] = entry
    ordered = sorted(kept.values(), key=lambda entry: entry[:2])
    limit = evaluation_share * 2**64
    return (
        [document for hashed, _, document in ordered if hashed >= limit],
        [document for hashed, _, document in ordered if hashed < limit],
    )


def read_documents(folder: Path) -> list[Document]:
    """All documents under `folder`, files in the order of their paths, rows as they come.

    A `.txt` file is one document; each line of a `.jsonl` file and each row of a `.parquet` file is one, with its text
    in the field `text` and, if it likes, a text or whole number in the field `id`. Other files, hidden files and
    documents of nothing but white space are passed over.

    Raises:
        DataError: the folder is missing or holds no document, or a file is not UTF-8, not JSON lines, not Parquet, or
            has a row without text; the error names the file and the row.
    """
    if not folder.is_dir():
        raise DataError(f"domain folder {folder} is not there, or is no folder")
    documents: list[Document] = []
    for path in sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).as_posix()):
        inside = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in inside.parts):
            continue
        read = _READERS.get(path.suffix.lower())
        if read is not None:
            documents += (document for document in read(path, inside.as_posix()) if document.text.strip())
    if not documents:
        raise DataError(f"domain folder {folder} holds no document (.txt, .jsonl or .parquet files with text in them)")
    return documents


def _read_txt(path: Path, name: str) -> Iterator[Document]:
    for row in _rows("text", path, sample_by="document", encoding="utf-8-sig"):
        yield Document(identity=f"path:{name}", text=row["text"])


def _read_jsonl(path: Path, name: str) -> Iterator[Document]:
    # As lines and not with the `json` reader of datasets, which guesses types (dates, numbers) and has no line numbers.
    for number, line in enumerate(_rows("text", path, encoding="utf-8-sig"), start=1):
        if not line["text"].strip():
            continue
        try:
            row = json.loads(line["text"])
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: not a JSON object with a field text")
        yield _document(row, name, number, f"{path}, line {number}")


def _read_parquet(path: Path, name: str) -> Iterator[Document]:
    from pyarrow import parquet  # type: ignore[import-untyped]

    try:  # before datasets does: it logs a line of its own about a broken file
        columns = parquet.read_schema(path).names
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise DataError(f"{path} is not a Parquet file: {error}") from error
    if "text" not in columns:
        raise DataError(f"{path} has no column text (its columns: {', '.join(columns)})")
    wanted = [column for column in ("text", "id") if column in columns]
    for number, row in enumerate(_rows("parquet", path, columns=wanted), start=1):
        yield _document(row, name, number, f"{path}, row {number}")


_READERS: dict[str, Callable[[Path, str], Iterator[Document]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _rows(kind: str, path: Path, **options: Any) -> Iterator[dict[str, Any]]:
    """Rows of one file, as the reader `kind` of datasets gives them."""
    import datasets

    pattern = glob.escape(str(path.resolve()))  # datasets takes file names as patterns, and finds nothing silently
    with tempfile.TemporaryDirectory(prefix="copal-") as cache:  # a streamed file leaves a lock file in the cache
        try:
            yield from datasets.load_dataset(
                kind, data_files=[pattern], split="train", streaming=True, cache_dir=cache, **options
            )
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 text ({error.reason}); convert it first") from error
        except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
            raise DataError(f"{path} cannot be read: {error}") from error


def _document(row: dict[str, Any], name: str, number: int, where: str) -> Document:
    text, given = row.get("text"), row.get("id")
    if "text" not in row:
        raise DataError(f"{where}: no field text")
    if not isinstance(text, str):
        raise DataError(f"{where}: the field text is not text but {type(text).__name__}")
    if given is not None and (isinstance(given, bool) or not isinstance(given, (str, int))):
        raise DataError(f"{where}: the field id is neither text nor a whole number but {type(given).__name__}")
    identity = f"path:{name}#{number}" if given in (None, "") else f"id:{given}"
    try:
        (identity + text).encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        raise DataError(f"{where}: not Unicode text ({error.reason})") from error
    return Document(identity=identity, text=text)


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
        ordered = sorted(documents, key=lambda document: _hash64(f"{self.seed}:order:{document.identity}"))
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
        slices = list(_slices(document.text, _SLICE_CHARACTERS * self.length))
        first = self._draw("slice", document, len(slices))
        opening = self._tokens(slices[first])
        begin = self._draw("token", document, max(1, len(opening) - payload + 1))
        onwards = map(self._tokens, slices[first + 1 :])
        back = map(self._tokens, slices[:first])
        yield from _chop(itertools.chain([opening[begin:]], onwards), payload)
        yield from _chop(itertools.chain(back, [opening[:begin]]), payload)

    def _draw(self, what: str, document: Document, choices: int) -> int:
        return _hash64(f"{self.seed}:{what}:{document.identity}") % choices

    def _tokens(self, text: str) -> list[int]:
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return tokens


def _slices(text: str, size: int) -> Iterator[str]:
    """Cut text into slices of at most `size` characters, before a space or line break where there is one."""
    start = 0
    while start < len(text):
        end = start + size
        if end < len(text):
            end = max(text.rfind("\n", start + 1, end), text.rfind(" ", start + 1, end))
            if end < 0:
                end = start + size
        yield text[start:end]
        start = end


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


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _digest(windows: Tensor) -> str:
    digest = hashlib.sha256(f"{tuple(windows.shape)}".encode())
    digest.update(windows.numpy().astype("<i8").tobytes())
    return digest.hexdigest()
