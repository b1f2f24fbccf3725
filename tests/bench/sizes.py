"""Sizes of the sensitivity state for models of known shape, computed: python tests/bench/sizes.py

Prints a markdown table: what a contribution takes of the 16-bit model (tied embeddings counted once), in full and in
compact storage. The configurations are the published ones.

No weight is read or made: the model's forward runs on fake tensors, which have shapes only, so that linears with a
common input are found as a step finds them, and the bytes are those of the tensors that a step would write. The float32
sum is not counted: only the newest version needs one, and contributions give it again.
"""

from __future__ import annotations

import json
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from copal.architecture import Architecture, load_skeleton
from copal.packing import block_bytes
from copal.recorder import MomentRecorder
from copal.sensitivity import Moment
from copal.state import contribution_tensors


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


def model_bytes(model: PreTrainedModel) -> int:
    """Bytes of the model in a 16-bit dtype; tied parameters count once."""
    return 2 * int(model.num_parameters())


def contribution_bytes(model: PreTrainedModel, storage: str) -> int:
    """Bytes of one domain's contribution for the criterion `output`, without the headers of its files.

    Args:
        model: from `copal.architecture.load_skeleton`; moved to the meta device.
        storage: `full` or `compact`.

    Raises:
        ModelError: no stack of decoder blocks is there.
    """
    model.to("meta")
    blocks = [model.get_submodule(name) for name in Architecture.of(model).blocks]
    compact = block_bytes(int(model.num_parameters()), len(blocks)) if storage == "compact" else None
    total = 0
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        with ExitStack() as stack:
            recorders = [stack.enter_context(MomentRecorder(block, gradient=False)) for block in blocks]
            model(torch.zeros(1, 8, dtype=torch.long, device="meta"), use_cache=False)
        for recorder in recorders:
            shapes = recorder.shapes()
            moments = {group: Moment(torch.empty(inputs, inputs), 1.0) for group, (_, inputs) in shapes.items()}
            tensors = contribution_tensors(moments, shapes, compact)
            total += sum(tensor.nbytes for tensor in tensors.values())
    return total


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
