"""Models that everybody knows, by their published configurations: for estimates, where no checkpoint is at hand."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from copal.errors import ModelError

__all__ = ["CONFIGS", "config_folder"]


def _llama(vocabulary: int, hidden: int, inner: int, blocks: int, heads: int, key_value_heads: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
    }


def _opt(hidden: int, inner: int, blocks: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "vocab_size": 50272,
        "hidden_size": hidden,
        "word_embed_proj_dim": hidden,
        "ffn_dim": inner,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "max_position_embeddings": 2048,
    }


_TIED = {"tie_word_embeddings": True}
_GEMMA_2 = {"model_type": "gemma2", "head_dim": 256, **_TIED}
_MIXTRAL = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}

CONFIGS: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": _llama(49152, 576, 1536, 30, 9, 3) | _TIED,
    "GPT-2": {"model_type": "gpt2"},  # transformers' defaults are those of the 124M model
    "OPT-1.3B": _opt(2048, 8192, 24, 32),
    "OPT-6.7B": _opt(4096, 16384, 32, 32),
    "Gemma-2-2B": _llama(256000, 2304, 9216, 26, 8, 4) | _GEMMA_2,
    "Gemma-2-9B": _llama(256000, 3584, 14336, 42, 16, 8) | _GEMMA_2,
    "Mistral-7B": _llama(32000, 4096, 14336, 32, 32, 8) | {"model_type": "mistral"},
    "Llama-2-7B": _llama(32000, 4096, 11008, 32, 32, 32),
    "Llama-3-8B": _llama(128256, 4096, 14336, 32, 32, 8),
    "Llama-2-13B": _llama(32000, 5120, 13824, 40, 40, 40),
    "Mixtral-8x7B": _llama(32000, 4096, 14336, 32, 32, 8) | _MIXTRAL,
    "Llama-2-70B": _llama(32000, 8192, 28672, 80, 64, 8),
    "Llama-3-70B": _llama(128256, 8192, 28672, 80, 64, 8),
}


@contextmanager
def config_folder(model: str) -> Iterator[Path]:
    """A folder with the config.json of `model`: a folder of that name, or a name in `CONFIGS`, however it is spelt.

    Raises:
        ModelError: it is neither.
    """
    if Path(model).expanduser().is_dir():
        yield Path(model).expanduser()
        return
    config = {name.lower(): config for name, config in CONFIGS.items()}.get(model.lower())
    if config is None:
        raise ModelError(f"{model!r} is no folder, and no model whose shape copal knows: {', '.join(CONFIGS)}")
    with tempfile.TemporaryDirectory(prefix="copal-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        yield Path(folder)
