"""What others wrote: read within bounds, and nothing in it has code run or anything fetched.

A model's files are data: `config.json`, the tokenizer's files and safetensors weights. transformers, however, imports
modules and asks hubs where a key of those files says so. All keys that do are listed here, with the reason.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from copal.bounded import read_json
from copal.errors import CopalError, ModelError
from copal.printable import printable

__all__ = [
    "PLAIN_ATTENTION",
    "PLAIN_EXPERTS",
    "leaves",
    "one_line",
    "plainly",
    "quiet",
    "read_object",
    "refuse_keys",
    "refuse_pointer",
]

_LONGEST = 300  # characters of what a library says
_POINTER = b"version https://git-lfs.github.com/spec/"

_CODE = "asks for code that comes with the model, which copal never runs"
_KERNEL = "names code of a hub or of another package, which transformers would fetch and import (CVE-2026-4372)"
PLAIN_ATTENTION = ("eager", "sdpa")
PLAIN_EXPERTS = ("eager", "batched_mm", "grouped_mm")
"""Implementations of attention and of experts that are transformers' own."""

_DELETE = "where transformers can do without, delete that key"


@dataclass(frozen=True, slots=True)
class _Key:
    """A key that is refused, at any depth of its file; empty values and the values named here do nothing and pass."""

    why: str
    remedy: str = _DELETE
    harmless: tuple[str, ...] = ()


_REFUSED: Mapping[str, Mapping[str, _Key]] = {
    "config.json": {
        "auto_map": _Key(_CODE, "where transformers knows the architecture itself, delete that key"),
        "custom_pipelines": _Key(_CODE),
        "attn_implementation": _Key(_KERNEL, harmless=PLAIN_ATTENTION),
        "_attn_implementation": _Key(_KERNEL, harmless=PLAIN_ATTENTION),
        "_attn_implementation_internal": _Key(_KERNEL, harmless=PLAIN_ATTENTION),
        "experts_implementation": _Key(_KERNEL, harmless=PLAIN_EXPERTS),
        "_experts_implementation": _Key(_KERNEL, harmless=PLAIN_EXPERTS),
        "_experts_implementation_internal": _Key(_KERNEL, harmless=PLAIN_EXPERTS),
        "use_pretrained_backbone": _Key("has transformers fetch the weights of another model"),
        "attribute_map": _Key("gives other keys new names, under which they would pass unseen"),
        "configuration_files": _Key("names another file in the place of this one", "put that file in its place"),
        "transformers_weights": _Key("names other weights than model.safetensors", "rename them, and delete that key"),
        "fusion_config": _Key("has transformers put other modules in the place of the model's"),
        "quantization_config": _Key(
            "says that the folder holds quantised weights", "dequantise them (a base is dense)"
        ),
        "compression_config": _Key("says that the folder holds quantised weights", "dequantise them (a base is dense)"),
    },
    "tokenizer_config.json": {
        "auto_map": _Key(_CODE, "save the tokenizer as tokenizer.json, and delete that key"),
        "fast_tokenizer_files": _Key("names another file in the place of tokenizer.json", "put that file in its place"),
        "gguf_file": _Key("names another file in the place of tokenizer.json", "save the tokenizer as tokenizer.json"),
        "init_inputs": _Key("has arguments for the tokenizer's class that no released tokenizer needs"),
    },
}
# These name files of the tokenizer. transformers looks for them in the folder, whatever is written here, and leftovers
# of another machine are common; of other keys it opens what they name, wherever that is (CWE-22).
_RESOLVED = ("tokenizer_file", "special_tokens_map_file", "added_tokens_file", "chat_template_file")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, of bounded size and depth.

    Raises:
        ModelError: the file holds anything else, or cannot be read.
    """
    refuse_pointer(path)
    value = read_json(path, ModelError)
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object")
    return value


def refuse_pointer(path: Path) -> None:
    """Check that a file is not what git keeps in the place of a large file (Git LFS).

    Raises:
        ModelError: it is, or it cannot be read.
    """
    try:
        with path.open("rb") as file:
            beginning = file.read(len(_POINTER))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    if beginning == _POINTER:
        raise ModelError(
            f"{path} is a pointer of Git LFS and not the file itself: run `git lfs pull` in the repository it is from"
        )


def refuse_keys(path: Path, value: Mapping[str, Any]) -> None:
    """Check that `value`, read from the file `path` of a model, has no code run and nothing fetched.

    Raises:
        ModelError: names the key, what it does, and what to do.
    """
    refused = _REFUSED.get(path.name, {})
    for key, found in _items(value):
        entry = refused.get(key)
        if entry and found and not all(leaf is None or leaf in entry.harmless for leaf in leaves(found)):
            raise ModelError(f"{path}: {key} {entry.why}; {entry.remedy}")
        if path.name == "tokenizer_config.json" and key.endswith("_file") and key not in _RESOLVED:
            _refuse_outside(path, key, found)


def leaves(value: Any) -> Iterator[Any]:
    """The values at the ends of lists and objects; `value` itself where it is neither. An empty one has none."""
    if isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from leaves(inner)
    else:
        yield value


@contextmanager
def quiet() -> Iterator[None]:
    """While transformers looks at what others wrote: its warnings and progress bars are not shown."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def plainly(what: str) -> Iterator[None]:
    """`quiet`, and whatever a library raises over what others wrote is an error of one line.

    Raises:
        ModelError: begins with `what`.
    """
    try:
        with quiet():
            yield
    except CopalError:
        raise
    except BaseException as error:  # tokenizers raises Exception itself, transformers whatever a value leads to
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # how Rust fails
            raise
        raise ModelError(f"{what}: {one_line(error)}") from error


@contextmanager
def unheard() -> Iterator[None]:
    """While libraries in Rust look at what others wrote: they tell the terminal of their failures themselves."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def one_line(error: BaseException) -> str:
    """What a library says, in one line that a terminal shows as it is."""
    kind, text = type(error).__name__, printable(" ".join(str(error).split()))
    if isinstance(error, (LookupError, TypeError, AttributeError)) or not text:  # that alone says little
        text = f"{kind}: {text}" if text else kind
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from value.items()
    if isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _items(inner)


def _refuse_outside(path: Path, key: str, named: Any) -> None:
    try:  # as it would be opened: from the working directory
        found = isinstance(named, str) and Path(named).is_file()
    except (OSError, ValueError):  # no name that a file can have
        return
    if found and not Path(named).resolve().is_relative_to(path.parent.resolve()):
        raise ModelError(f"{path}: {key} names a file outside of the model's folder, {named!r}; {_DELETE}")
