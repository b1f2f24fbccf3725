"""The tokenizer of a model folder, loaded without its code, and whether it is that of the model's weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from copal.errors import ModelError
from copal.folder import CONFIG, TOKENIZER, VOCABULARIES
from copal.foreign import plainly, read_object, refuse_keys, refuse_pointer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["check_tokenizer", "check_tokenizer_files", "load_tokenizer"]

_MAP = "special_tokens_map.json"
_OBJECTS = ("tokenizer_config.json", _MAP, "added_tokens.json")
_CLASS = re.compile(r"(?!Auto)[A-Za-z]\w*(Tokenizer(Fast)?|Backend)")
_TOKEN = {"__type", "content", "id", "lstrip", "normalized", "rstrip", "single_word", "special"}
_SAMPLE = "The quick brown fox jumps over 13 lazy dogs.\n\tna\u00efve \u6771\u4eac \U0001f642"
_LARGEST = 256 << 20  # bytes of a file; the largest on the hub have 35 MB


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`. No code that comes with it is run, no hub is asked, no chat template is rendered.

    Raises:
        ModelError: there is none, or none that the installed transformers can load; one line.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerBase
    from transformers.utils import is_sentencepiece_available

    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise ModelError(f"{folder} has no tokenizer ({', '.join(VOCABULARIES)})")
    try:
        with plainly(f"the tokenizer in {folder} cannot be loaded"):
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            if not isinstance(tokenizer, PreTrainedTokenizerBase):
                raise TypeError(f"a {type(tokenizer).__name__} is no tokenizer")
    except ModelError as error:
        models = sorted(path.name for path in folder.glob("*.model"))
        if models and not (folder / "tokenizer.json").is_file() and not is_sentencepiece_available():
            raise ModelError(
                f"{folder / models[0]} needs the library sentencepiece: pip install sentencepiece, or save the "
                "tokenizer with save_pretrained where that is installed, which writes tokenizer.json"
            ) from error
        raise
    return tokenizer


def check_tokenizer_files(folder: Path) -> None:
    """Check that the tokenizer's files in `folder` are what they seem to be, and ask for nothing but to be read.

    Raises:
        ModelError: names the file, the key and what to do.
    """
    for path in [folder / name for name in (*TOKENIZER, "chat_template.jinja") if (folder / name).is_file()]:
        refuse_pointer(path)
        if path.stat().st_size > _LARGEST:
            raise ModelError(f"{path} is larger than {_LARGEST >> 20} MB, which no tokenizer is")
        if path.name in _OBJECTS:
            settings = read_object(path)
            refuse_keys(path, settings)
            _check_class(path, settings)
            _check_tokens(path, settings)
    _check_class(folder / CONFIG, read_object(folder / CONFIG))


def check_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Check that a tokenizer reads text, and that each of its tokens has a row in embeddings of `rows` rows.

    Raises:
        ModelError: it does not; one line that names a token without a row.
    """
    with plainly(f"the tokenizer in {folder} cannot read text"):
        read = tokenizer(_SAMPLE, add_special_tokens=False)["input_ids"]
        ids = {str(token): number for token, number in tokenizer.get_vocab().items()}
        ids |= {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}
        special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    if not read:
        raise ModelError(f"the tokenizer in {folder} reads nothing in plain text ({_SAMPLE!r})")
    for token, number in special.items():
        if number is None:
            raise ModelError(f"the tokenizer in {folder} has the special token {token!r}, and no id for it")
    token = max(ids, key=lambda name: ids[name])
    if not 0 <= ids[token] < rows:
        raise ModelError(
            f"the tokenizer in {folder} has the token {token!r} with id {ids[token]}, and the model's embeddings have "
            f"{rows} rows, for ids up to {rows - 1}: it is that of another model, or tokens were added to it alone; "
            "take the tokenizer that belongs to these weights"
        )


def _check_class(path: Path, settings: Mapping[str, Any]) -> None:
    """Check that what a file names as the tokenizer's class is one: transformers would load anything that it has.

    In the place of a tokenizer that it does not know it takes a plain one, with what tokenizer.json says.
    """
    name = settings.get("tokenizer_class")
    if name is not None and not (isinstance(name, str) and _CLASS.fullmatch(name)):
        raise ModelError(f"{path}: tokenizer_class is {name!r}, which is no tokenizer")


def _check_tokens(path: Path, settings: Mapping[str, Any]) -> None:
    """Check the keys of tokens that are spelled as objects: tokenizers prints others to the terminal, as they are."""
    for key, value in settings.items():
        inner = value.values() if isinstance(value, dict) and key == "added_tokens_decoder" else [value]
        for token in value if isinstance(value, list) else inner:
            is_token = isinstance(token, dict) and ("content" in token or key.endswith("_token") or path.name == _MAP)
            if is_token and not token.keys() <= _TOKEN:
                unknown = ", ".join(map(repr, sorted(token.keys() - _TOKEN)[:3]))
                raise ModelError(f"{path}: {key} has a token with keys that no token has: {unknown}")
