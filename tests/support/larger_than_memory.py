"""Peak memory of two steps and an evaluation: python larger_than_memory.py FOLDER MEGABYTES

Writes a synthetic checkpoint of that size into FOLDER, prunes it twice (the second step has a parent) and evaluates
what comes out. Prints JSON: the checkpoint's size, resident memory of the bare process and its peak in bytes; seconds.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig
from transformers.models.llama import modeling_llama  # noqa: F401  (part of the bare process)

from copal.baselines import wanda
from copal.config import CalibrationConfig, PruneConfig
from copal.evaluation import evaluate
from copal.solve import prune_group
from copal.step import Base, NewDomain, Parent, prune_step
from support.memory import memory

HIDDEN, INTERMEDIATE, VOCABULARY = 512, 1024, 256
CPU = torch.device("cpu")


def write_checkpoint(folder: Path, size: int) -> int:
    """A random Llama of at least `size` bytes in float32, a block a shard, written with one block in memory."""
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (HIDDEN // 4, HIDDEN),
        "self_attn.v_proj": (HIDDEN // 4, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    blocks = -(-size // (4 * sum(torch.Size(shape).numel() for shape in shapes.values())))
    LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=blocks, num_attention_heads=8,
        num_key_value_heads=2, vocab_size=VOCABULARY, tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    outside = {"model.embed_tokens": (VOCABULARY, HIDDEN), "model.norm": (HIDDEN,), "lm_head": (VOCABULARY, HIDDEN)}
    generator, weight_map, written = torch.Generator().manual_seed(0), {}, 0
    for shard in range(blocks + 1):
        here = {f"model.layers.{shard}.{name}": shape for name, shape in shapes.items()} if shard < blocks else outside
        tensors = {
            f"{name}.weight": torch.randn(shape, generator=generator) * 0.02 if len(shape) > 1 else torch.ones(shape)
            for name, shape in here.items()
        }
        file = f"model-{shard + 1:05d}-of-{blocks + 1:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        written += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": written}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return written


def main(folder: Path, size: int) -> None:
    size = write_checkpoint(folder / "base", size)
    bare, began = memory("VmRSS"), time.perf_counter()
    parent = None
    generator = torch.Generator().manual_seed(1)
    for version, name in enumerate(("code", "legal"), start=2):
        windows = torch.randint(VOCABULARY, (4, 32), generator=generator)
        prune_step(
            Base(folder=folder / "base", fingerprint="base"),
            parent,
            NewDomain(name=name, md5="1", weight=1.0, windows=windows),
            folder / name,
            calibration=CalibrationConfig(),
            prune=PruneConfig(criterion="loss", rounds=(1.0,), iterations=1),
            device=CPU,
            dtype=torch.float32,
            method=prune_group if parent else wanda,  # the first version only has to be there
        )
        parent = Parent.from_step(folder / name, version, parent)
    evaluate(parent.model, {"legal": windows}, device=CPU, dtype=torch.float32)
    print(json.dumps({"size": size, "bare": bare, "peak": memory("VmHWM"), "seconds": time.perf_counter() - began}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) * 10**6)
