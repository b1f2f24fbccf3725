from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from copal.base import base_fingerprint, open_base
from copal.checkpoint import Checkpoint
from copal.errors import ModelError


def test_an_opened_base_has_its_fingerprint_and_its_tokenizer(tiny_base: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    base = open_base(tiny_base, lambda *progress: heard.append(progress))
    assert base.folder == tiny_base
    assert base.fingerprint == base_fingerprint(tiny_base)
    tokens = base.tokenizer()("lessee", add_special_tokens=False)["input_ids"]
    assert len(tokens) == 6  # of bytes
    assert {stage for stage, _, _ in heard} == {"check", "fingerprint"}
    assert heard[-1][1] == heard[-1][2] > 0


def test_what_cannot_be_pruned_is_refused_when_it_is_opened(make_model, tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no tokenizer"):
        open_base(make_model())
    quantised = shutil.copytree(tiny_base, tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    with pytest.raises(ModelError, match="holds quantised weights"):
        open_base(quantised)
    with pytest.raises(ModelError, match="it has no config"):
        open_base(tmp_path / "nowhere")


def test_of_a_single_file_and_shards_the_one_counts_that_transformers_loads(tiny_base: Path, tmp_path: Path) -> None:
    both = shutil.copytree(tiny_base, tmp_path / "both")
    shard = {name: torch.zeros_like(tensor) for name, tensor in load_file(both / "model.safetensors").items()}
    save_file(shard, both / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(shard, "model-00001-of-00001.safetensors")}
    (both / "model.safetensors.index.json").write_text(json.dumps(index))
    assert open_base(both).fingerprint == base_fingerprint(tiny_base)
    checkpoint = Checkpoint(both)
    read = checkpoint.read(checkpoint.names())
    loaded = AutoModelForCausalLM.from_pretrained(both).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in read.items())
    assert any(tensor.any() for tensor in read.values())
