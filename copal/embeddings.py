"""Embeddings outside the blocks, of tokens and of learned positions: what they have rows for, and are asked for.

torch says of a row that is not there "index out of range" on a CPU, and on a GPU it ends the process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from copal.architecture import find_blocks
from copal.errors import ModelError, SettingsError

__all__ = ["RowsThere", "longest_window", "token_rows"]

_MORE = 8  # rows beside those of positions; OPT has 2


def token_rows(model: PreTrainedModel) -> int:
    """For how many tokens `model` has embeddings."""
    return int(model.get_input_embeddings().weight.shape[0])


def longest_window(model: PreTrainedModel) -> int | None:
    """Tokens of a window for which `model` has learned positions; None where it computes them (RoPE, ALiBi).

    Learned ones are an embedding outside the blocks that has a row for each position, and at most a few more.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    blocks = tuple(f"{name}." for name in find_blocks(model))
    rows = [
        module.num_embeddings
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        and module is not model.get_input_embeddings()
        and not name.startswith(blocks)
    ]
    learned = isinstance(positions, int) and any(positions <= found <= positions + _MORE for found in rows)
    return positions if learned else None


class RowsThere(TorchFunctionMode):
    """While a model embeds `tokens` (B, L): a row that is not there is said plainly.

    Raises:
        ModelError: it is a token's.
        SettingsError: it is a position's.
    """

    def __init__(self, folder: Path, tokens: Tensor) -> None:
        super().__init__()
        self._folder, self._tokens = folder, tokens

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.embedding:
            self._look(*args[:2])
        return func(*args, **(kwargs or {}))

    def _look(self, wanted: Tensor, weight: Tensor) -> None:
        highest, rows = int(wanted.max()), len(weight)
        if highest < rows:
            return
        if wanted.equal(self._tokens):
            raise ModelError(
                f"{self._folder}: token {highest} is wanted, and the model's embeddings have {rows} rows: "
                "the tokenizer is not that of these weights"
            )
        raise SettingsError(
            f"{self._folder} has learned positions for fewer than {self._tokens.shape[1]} tokens (its embedding of "
            f"them has {rows} rows): lower calibration.window_length"
        )
