from __future__ import annotations

import json

import pytest
import torch
from sizes import contribution_bytes, model_bytes

from copal.architecture import load_skeleton
from copal.config import CalibrationConfig, PruneConfig
from copal.packing import block_bytes
from copal.step import Base, NewDomain, prune_step

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
LLAMA_2_7B = LLAMA | {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32,
}  # fmt: skip
SMOLLM2_135M = LLAMA | {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.mark.parametrize("storage", ["full", "compact"])
def test_the_computed_size_is_that_of_the_files_that_a_step_writes(make_model, make_windows, tmp_path, cpu, storage):
    base = make_model(hidden=96, blocks=3)
    domain = NewDomain(name="code", md5="1", weight=1.0, windows=make_windows(0))
    prune_step(
        Base(folder=base, fingerprint="base"), None, domain, tmp_path / "out",
        calibration=CalibrationConfig(storage=storage), prune=PruneConfig(iterations=2), device=cpu,
        dtype=torch.float32,
    )  # fmt: skip
    files = list((tmp_path / "out" / "state" / "contribution").iterdir())
    assert len(files) == 3
    headers = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in files)
    assert contribution_bytes(load_skeleton(base), storage) == sum(file.stat().st_size for file in files) - headers


@pytest.mark.parametrize(
    ("config", "parameters", "full"), [(SMOLLM2_135M, 134_515_008, 0.375), (LLAMA_2_7B, 6_738_415_616, 0.408)]
)
def test_a_contribution_is_at_most_half_of_the_16_bit_model_and_a_compact_one_a_twentieth(
    tmp_path, config, parameters, full
):
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load_skeleton(tmp_path)
    size = model_bytes(model)
    assert size == 2 * parameters
    assert contribution_bytes(model, "full") / size == pytest.approx(full, abs=1e-3)
    compact = contribution_bytes(model, "compact")
    blocks = config["num_hidden_layers"]
    assert 0.95 * block_bytes(parameters, blocks) <= compact / blocks <= block_bytes(parameters, blocks)
    headers = 4096 * blocks  # of a file of 12 tensors: a third of that
    assert compact + headers <= 0.05 * size
