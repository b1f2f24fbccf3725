"""A tiny random model of every architecture that the contract names, and what the whole model makes of windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
KEY_VALUE = {"num_key_value_heads": 2}
GEMMA = {**SMALL, **KEY_VALUE, "head_dim": 8, "query_pre_attn_scalar": 8}
QWEN_MOE = {**SMALL, **KEY_VALUE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ARCHITECTURES = {
    "llama": {**SMALL, **KEY_VALUE},
    "mistral": {**SMALL, **KEY_VALUE, "sliding_window": 16},
    "qwen2": {**SMALL, **KEY_VALUE},
    "qwen3": {**SMALL, **KEY_VALUE, "head_dim": 8},
    "gemma2": {**GEMMA, "sliding_window": 16},
    "gemma3_text": {**GEMMA, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {**SMALL, **KEY_VALUE, "pad_token_id": 0},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "gpt_neox": SMALL,
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "mixtral": {**SMALL, **KEY_VALUE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**QWEN_MOE, "shared_expert_intermediate_size": 48},
    "qwen3_moe": {**QWEN_MOE, "head_dim": 8},
    "unheard_of": {},
}


class UnheardOfConfig(PreTrainedConfig):
    model_type = "unheard_of"


class Floor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.widen, self.narrow = nn.Linear(16, 16), nn.Linear(16, 24, bias=False), nn.Linear(24, 16)

    def forward(self, x: torch.Tensor, scale: float) -> tuple[torch.Tensor]:
        x = x + scale * self.mix(x).cumsum(1) / x.shape[1]
        return (x + self.narrow(self.widen(x).relu()),)


class UnheardOf(PreTrainedModel):
    """An architecture that copal has no word of: other names, another call of a block, a tuple as its result."""

    config_class = UnheardOfConfig
    _tied_weights_keys = {"head.weight": "words.weight"}  # noqa: RUF012

    def __init__(self, config: UnheardOfConfig) -> None:
        super().__init__(config)
        self.words, self.head = nn.Embedding(64, 16), nn.Linear(16, 64)
        self.tower = nn.ModuleDict({"floors": nn.ModuleList(Floor() for _ in range(2))})
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> CausalLMOutput:
        x = self.words(input_ids)
        for floor in self.tower["floors"]:
            x = floor(x, scale=0.5)[0]
        return CausalLMOutput(logits=self.head(x))


def random_model(kind: str, **more: Any) -> PreTrainedModel:
    """A tiny random model of that type, of 64 tokens and 64 positions; `more` goes into its configuration."""
    AutoConfig.register("unheard_of", UnheardOfConfig, exist_ok=True)
    AutoModelForCausalLM.register(UnheardOfConfig, UnheardOf, exist_ok=True)
    torch.manual_seed(0)
    settings = {"vocab_size": 64, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1}
    config = AutoConfig.for_model(kind, **{**settings, **ARCHITECTURES.get(kind, {}), **more})
    return AutoModelForCausalLM.from_config(config)


def write_model(architecture: str, folder: Path) -> None:
    """The folder of `random_model`, float32, without a tokenizer."""
    random_model(architecture).save_pretrained(folder)


def nats_of_the_whole_model(folder: Path, windows: torch.Tensor) -> float:
    """What `from_pretrained` makes of windows (N, L): the summed negative log-likelihood of the predicted tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(windows).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten(), reduction="sum").item()
