"""One contract that every architecture passes, with a tiny random configuration of each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from copal.architecture import Architecture, find_blocks, load_skeleton
from copal.checkpoint import Checkpoint
from copal.config import CalibrationConfig, PruneConfig
from copal.errors import ModelError
from copal.estimate import estimate_step
from copal.evaluation import evaluate
from copal.meter import Meter
from copal.shapes import StepSettings
from copal.step import Base, NewDomain, prune_step
from copal.streaming import StreamedModel
from support.architectures import ARCHITECTURES, QWEN_MOE, SMALL, nats_of_the_whole_model, write_model

ROUTERS = (".mlp.gate.weight", ".mlp.shared_expert_gate.weight")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    write_model(request.param, folder)
    return folder


def test_streaming_gives_the_loss_of_the_whole_model(folder, make_windows, cpu):
    windows = make_windows(0, vocabulary=64)
    score = evaluate(folder, {"a": windows}, device=cpu, dtype=torch.float32, batch=3)["a"]
    assert score.nats == pytest.approx(nats_of_the_whole_model(folder, windows), rel=1e-5)


def test_a_step_halves_every_linear_of_the_blocks_and_touches_nothing_else(folder, make_windows, tmp_path, cpu):
    windows = make_windows(0, vocabulary=64)
    domain = NewDomain(name="a", md5="-", weight=1.0, windows=windows)
    report = prune_step(
        Base(folder=folder, fingerprint="-"), None, domain, tmp_path / "v",
        calibration=CalibrationConfig(window_length=32), prune=PruneConfig(criterion="output"), device=cpu,
        dtype=torch.float32,
    )  # fmt: skip
    model = tmp_path / "v" / "model"
    dense = AutoModelForCausalLM.from_pretrained(folder)
    blocks = tuple(f"{name}." for name in find_blocks(dense))
    halved = 0
    for name, weight in AutoModelForCausalLM.from_pretrained(model).state_dict().items():
        if name.startswith(blocks) and weight.ndim > 1 and not name.endswith(ROUTERS):
            shares = (weight == 0).double().mean((-2, -1))  # of every expert on its own
            torch.testing.assert_close(shares, torch.full_like(shares, 0.5))
            halved += weight.numel()
        else:
            assert torch.equal(weight, dense.state_dict()[name])
    assert sum(layer.weights for layer in report.layers) == halved
    assert report.sparsity == pytest.approx(0.5, abs=1e-6)
    assert all(0 < layer.error_after < 1 for layer in report.layers)
    score = evaluate(model, {"a": windows}, device=cpu, dtype=torch.float32)["a"]
    assert score.nats == pytest.approx(nats_of_the_whole_model(model, windows), rel=1e-5)


def test_where_the_loss_decides_half_of_all_weights_go_and_no_row_strays_too_far(folder, make_windows, tmp_path, cpu):
    windows = make_windows(0, vocabulary=64)
    report = prune_step(
        Base(folder=folder, fingerprint="-"), None, NewDomain(name="a", md5="-", windows=windows), tmp_path / "v",
        calibration=CalibrationConfig(window_length=32), prune=PruneConfig(criterion="loss"), device=cpu,
        dtype=torch.float32,
    )  # fmt: skip
    model = StreamedModel(tmp_path / "v" / "model", device=cpu, dtype=torch.float32)
    zeros = weights = 0
    for index in range(len(model)):
        for weight in model.weights(index).values():
            rows = (weight == 0).sum(1)
            assert rows.min() >= round(0.2 * weight.shape[1])
            assert rows.max() <= round(0.8 * weight.shape[1])
            zeros, weights = zeros + int(rows.sum()), weights + weight.numel()
    assert zeros == sum(layer.zeros for layer in report.layers)
    assert zeros == sum(layer.weights // 2 for layer in report.layers)
    assert len({layer.zeros / layer.weights for layer in report.layers}) > 1


def test_what_a_step_takes_is_computed_from_the_configuration_alone(folder, make_windows, tmp_path, cpu):
    calibration = CalibrationConfig(window_length=32, windows=2)
    prune = PruneConfig(criterion="loss", rounds=(1.0,), iterations=1)
    with Meter() as meter:
        prune_step(
            Base(folder=folder, fingerprint="-"), None,
            NewDomain(name="a", md5="-", windows=make_windows(0, windows=2, vocabulary=64)), tmp_path / "v",
            calibration=calibration, prune=prune, device=cpu, dtype=torch.float32,
        )  # fmt: skip
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    settings = StepSettings(calibration=calibration, prune=prune, domains=1, dtype=torch.float32)
    found = estimate_step(tmp_path, settings)
    operations = sum(work.half + work.single for part, work in found.work.items() if part != "evaluation")
    assert meter.operations.total() == pytest.approx(operations, rel=0.01)  # angles of rotary embeddings: once a batch
    files = [file for part in ("model", "state") for file in (tmp_path / "v" / part).rglob("*.safetensors")]
    headers = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in files)
    assert found.disk.version == sum(file.stat().st_size for file in files) - headers


def test_a_checkpoint_without_the_base_models_prefix_is_read_and_written_as_it_is(make_windows, tmp_path, cpu):
    """As gpt2 lies on the hub: `h.0...`, not `transformer.h.0...`."""
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    config = AutoConfig.for_model("gpt2", vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "with")
    model.save_pretrained(tmp_path / "without")
    weights = load_file(tmp_path / "with" / "model.safetensors")
    bare = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    save_file(bare, tmp_path / "without" / "model.safetensors", metadata={"format": "pt"})
    windows = {"a": make_windows(0, vocabulary=64)}
    expected = evaluate(tmp_path / "with", windows, device=cpu, dtype=torch.float32)
    assert evaluate(tmp_path / "without", windows, device=cpu, dtype=torch.float32) == expected


def test_a_checkpoint_with_the_names_of_the_modules_is_read_as_one_with_the_names_of_the_hub(
    make_windows, tmp_path, cpu
):
    """transformers renames Pythia's head on loading and on saving: `embed_out`, `lm_head`."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_neox", vocab_size=64, **SMALL))
    model.save_pretrained(tmp_path / "hub")
    model.save_pretrained(tmp_path / "modules", save_original_format=False)
    assert "embed_out.weight" in Checkpoint(tmp_path / "hub").names()
    assert "lm_head.weight" in Checkpoint(tmp_path / "modules").names()
    windows = {"a": make_windows(0, vocabulary=64)}
    expected = evaluate(tmp_path / "hub", windows, device=cpu, dtype=torch.float32)
    assert evaluate(tmp_path / "modules", windows, device=cpu, dtype=torch.float32) == expected


def test_buffers_that_a_checkpoint_holds_are_read(make_windows, tmp_path, cpu):
    """GLM's routers choose experts with a bias that is no parameter."""
    torch.manual_seed(0)
    sizes = {**QWEN_MOE, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 0, "head_dim": 8}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("glm4_moe", vocab_size=64, pad_token_id=0, **sizes))
    for layer in model.model.layers:
        layer.mlp.gate.e_score_correction_bias.copy_(torch.randn(4))
    model.save_pretrained(tmp_path / "base")
    windows = make_windows(0, vocabulary=64)
    score = evaluate(tmp_path / "base", {"a": windows}, device=cpu, dtype=torch.float32)["a"]
    assert score.nats == pytest.approx(nats_of_the_whole_model(tmp_path / "base", windows), rel=1e-6)


def test_a_model_without_recognisable_blocks_gets_an_error_that_says_what_was_looked_for():
    with pytest.raises(ModelError, match="ModuleList whose elements are all of one class"):
        Architecture.of(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))


def test_the_outermost_list_of_blocks_is_taken():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    model = nn.Module()
    model.layers = nn.ModuleList(Block() for _ in range(2))
    assert Architecture.of(model).blocks == ("layers.0", "layers.1")
    assert Architecture.of(model).linears[0] == ("experts.0", "experts.1", "experts.2")


def test_weights_of_another_shape_than_the_configuration_says_are_named(make_model, make_windows, cpu):
    folder = make_model()
    config = (folder / "config.json").read_text().replace('"intermediate_size": 64', '"intermediate_size": 96')
    (folder / "config.json").write_text(config)
    with pytest.raises(ModelError, match=r"mlp\.(gate|up|down)_proj\.weight has shape"):
        evaluate(folder, {"a": make_windows(0)}, device=cpu, dtype=torch.float32)


def test_an_encoder_is_no_causal_language_model(tmp_path):
    AutoConfig.for_model("t5").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="not a causal language model"):
        load_skeleton(tmp_path)
