"""Random Llamas of any size, written a block at a time: a model larger than memory too."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class Llama:
    """The sizes of a model. Embeddings and head are not tied."""

    hidden: int
    inner: int
    blocks: int
    heads: int
    key_value_heads: int
    vocabulary: int

    @property
    def block(self) -> dict[str, tuple[int, ...]]:
        """The shapes of a block's weights, by their names in it."""
        narrow = self.hidden * self.key_value_heads // self.heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (narrow, self.hidden),
            "self_attn.v_proj": (narrow, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.inner, self.hidden),
            "mlp.up_proj": (self.inner, self.hidden),
            "mlp.down_proj": (self.hidden, self.inner),
            "input_layernorm": (self.hidden,),
            "post_attention_layernorm": (self.hidden,),
        }

    @property
    def outside(self) -> dict[str, tuple[int, ...]]:
        """Those of what belongs to no block."""
        table = (self.vocabulary, self.hidden)
        return {"model.embed_tokens": table, "model.norm": (self.hidden,), "lm_head": table}

    @property
    def parameters(self) -> int:
        """How many the model has."""
        sizes = [torch.Size(shape).numel() for shape in self.block.values()]
        return self.blocks * sum(sizes) + sum(torch.Size(shape).numel() for shape in self.outside.values())


def write_llama(
    folder: Path, llama: Llama, *, dtype: torch.dtype = torch.float32, device: torch.device = CPU, spread: float = 0.02
) -> int:
    """Write the folder of such a model, a block a shard, and return the bytes of its weights.

    `spread`: the weights' standard deviation. They are drawn on `device`, each time the same there.
    """
    LlamaConfig(
        hidden_size=llama.hidden, intermediate_size=llama.inner, num_hidden_layers=llama.blocks,
        num_attention_heads=llama.heads, num_key_value_heads=llama.key_value_heads, vocab_size=llama.vocabulary,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=1, architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    generator, weight_map, written = torch.Generator(device).manual_seed(0), {}, 0

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:  # of a norm
            return torch.ones(shape, dtype=dtype)
        return torch.randn(shape, generator=generator, device=device, dtype=dtype).mul_(spread).cpu()

    for shard in range(llama.blocks + 1):
        inside = {f"model.layers.{shard}.{name}": shape for name, shape in llama.block.items()}
        shapes = inside if shard < llama.blocks else llama.outside
        tensors = {f"{name}.weight": draw(shape) for name, shape in shapes.items()}
        file = f"model-{shard + 1:05d}-of-{llama.blocks + 1:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        written += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": written}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return written
