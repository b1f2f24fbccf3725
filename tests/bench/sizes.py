"""Sizes of the sensitivity state for models of known shape, computed: python tests/bench/sizes.py

Prints a markdown table: what a contribution takes of the 16-bit model (tied embeddings counted once), in full and in
compact storage. Needs no weights; the configurations are the published ones.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from copal.architecture import load_skeleton
from copal.sizes import contribution_bytes, model_bytes


def llama(vocabulary: int, hidden: int, inner: int, blocks: int, heads: int, key_value_heads: int, **more) -> dict:
    return {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        **more,
    }


def opt(hidden: int, inner: int, blocks: int, heads: int) -> dict:
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


CONFIGS = {
    "SmolLM2-135M": llama(49152, 576, 1536, 30, 9, 3, tie_word_embeddings=True),
    "Llama-2-7B": llama(32000, 4096, 11008, 32, 32, 32),
    "Llama-3-8B": llama(128256, 4096, 14336, 32, 32, 8),
    "Mistral-7B": llama(32000, 4096, 14336, 32, 32, 8, model_type="mistral"),
    "GPT-2": {"model_type": "gpt2"},  # transformers' defaults are those of the 124M model
    "OPT-1.3B": opt(2048, 8192, 24, 32),
    "OPT-6.7B": opt(4096, 16384, 32, 32),
    "Gemma-2-2B": llama(256000, 2304, 9216, 26, 8, 4, head_dim=256, model_type="gemma2", tie_word_embeddings=True),
    "Gemma-2-9B": llama(256000, 3584, 14336, 42, 16, 8, head_dim=256, model_type="gemma2", tie_word_embeddings=True),
}


def main() -> None:
    print("| model | parameters | 16-bit model, MB | full, MB | share | compact, MB | share |")
    print("|---|---|---|---|---|---|---|")
    for name, config in CONFIGS.items():
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config))
            model = load_skeleton(Path(folder))
        whole = model_bytes(model)
        sizes = (contribution_bytes(model, storage) for storage in ("full", "compact"))
        cells = " | ".join(f"{size / 1e6:,.1f} | {size / whole:.3f}" for size in sizes)
        print(f"| {name} | {whole / 2e9:.3f} B | {whole / 1e6:,.0f} | {cells} |")


if __name__ == "__main__":
    main()
