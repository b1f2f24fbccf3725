"""The head and the embeddings that count are those that `from_pretrained` takes, whatever config.json says of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from copal.config import CalibrationConfig, PruneConfig
from copal.errors import ModelError
from copal.evaluation import evaluate
from copal.step import Base, NewDomain, prune_step
from support.architectures import ARCHITECTURES, SMALL, nats_of_the_whole_model, random_model

BIASED = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "phi": SMALL,  # of its head as well
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
}


def save(model: PreTrainedModel, folder: Path, *, tied: bool) -> tuple[str, str]:
    """Save a model whose every weight counts, config.json saying whether it is tied: the names of embeddings and head.

    Both are stored where they differ; the head's name is what it would be."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    embeddings, head = (
        next(name for name, tensor in stored.items() if torch.equal(tensor, module.weight))
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": tied}))
    return embeddings, head


def edit(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Put tensors into the checkpoint, or (None) take them out."""
    weights = load_file(folder / "model.safetensors") | tensors
    kept = {name: tensor.contiguous() for name, tensor in weights.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def assert_equal_figures(folder: Path, windows: torch.Tensor) -> float:
    score = evaluate(folder, {"a": windows}, device=torch.device("cpu"), dtype=torch.float32)["a"]
    assert score.nats == pytest.approx(nats_of_the_whole_model(folder, windows), rel=1e-5)
    return score.nats


@pytest.fixture
def windows(make_windows) -> torch.Tensor:
    return make_windows(0, windows=2, vocabulary=64)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_figures_are_those_of_from_pretrained_whatever_is_tied_and_stored(kind, windows, tmp_path):
    model = random_model(kind, tie_word_embeddings=False)
    embeddings, head = save(model, tmp_path, tied=False)
    untied = assert_equal_figures(tmp_path, windows)

    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert assert_equal_figures(tmp_path, windows) == pytest.approx(untied)  # both stored and not equal: not tied

    shared = load_file(tmp_path / "model.safetensors")[embeddings]
    edit(tmp_path, **{head: shared.clone()})
    tied = assert_equal_figures(tmp_path, windows)
    assert abs(tied - untied) > 1e-3
    for left_out in (head, embeddings):
        edit(tmp_path, **{head: shared.clone(), embeddings: shared, left_out: None})
        assert assert_equal_figures(tmp_path, windows) == pytest.approx(tied)

    edit(tmp_path, **{head: None, embeddings: None})
    with pytest.raises(ModelError, match="has no tensor"):
        evaluate(tmp_path, {"a": windows}, device=torch.device("cpu"), dtype=torch.float32)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_figures_are_those_of_from_pretrained_in_16_bit_shards(kind, windows, tmp_path):
    model = random_model(kind, dtype=torch.float16)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert_equal_figures(tmp_path, windows)


@pytest.mark.parametrize("kind", BIASED)
@pytest.mark.parametrize("tied", [False, True])
def test_figures_are_those_of_from_pretrained_with_biases(kind, tied, windows, tmp_path):
    save(random_model(kind, **BIASED[kind], tie_word_embeddings=tied), tmp_path, tied=tied)
    assert any(name.endswith("bias") for name in load_file(tmp_path / "model.safetensors"))
    assert_equal_figures(tmp_path, windows)


def test_a_pruned_version_has_the_figures_of_from_pretrained_where_the_stored_head_is_another(windows, tmp_path):
    save(random_model("llama", tie_word_embeddings=False), tmp_path / "base", tied=True)
    prune_step(
        Base(folder=tmp_path / "base", fingerprint="-"), None, NewDomain(name="a", md5="-", windows=windows),
        tmp_path / "v", calibration=CalibrationConfig(window_length=32), prune=PruneConfig(), dtype=torch.float32,
    )  # fmt: skip
    dense, pruned = (load_file(file)["lm_head.weight"] for file in files_with_the_head(tmp_path))
    assert torch.equal(dense, pruned)
    assert_equal_figures(tmp_path / "v" / "model", windows)


def files_with_the_head(folder: Path) -> list[Path]:
    index = json.loads((folder / "v" / "model" / "model.safetensors.index.json").read_text())
    return [folder / "base" / "model.safetensors", folder / "v" / "model" / index["weight_map"]["lm_head.weight"]]
