"""Experts are pruned one by one, whatever their routers give them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from copal.architecture import load_skeleton
from copal.baselines import magnitude
from copal.checkpoint import Checkpoint
from copal.config import CalibrationConfig, PruneConfig
from copal.errors import ModelError
from copal.recorder import OTHERS_SHARE, MomentRecorder
from copal.solve import prune_group
from copal.step import Base, NewDomain, Parent, PruneGroup, StepReport, prune_step

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
}
IDLE = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral whose expert IDLE is nobody's second choice: its logit lies between those of the other four."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **SIZES))
    for layer in model.model.layers:
        direction = torch.randn(SIZES["hidden_size"])
        layer.mlp.gate.weight.data = torch.outer(torch.tensor([2.0, 1.0, -1.0, -2.0, 0.0]), direction)
    folder = tmp_path_factory.mktemp("mixtral")
    model.save_pretrained(folder)
    return folder


def step(
    base: Path, out: Path, windows: torch.Tensor, *, name: str = "a", parent: Path | None = None,
    criterion: str = "output", method: PruneGroup = prune_group,
) -> StepReport:  # fmt: skip
    before = Parent(version=2, model=parent / "model", state=parent / "state", states={}) if parent else None
    return prune_step(
        Base(folder=base, fingerprint="-"), before, NewDomain(name=name, md5="-", weight=1.0, windows=windows), out,
        calibration=CalibrationConfig(window_length=32), prune=PruneConfig(criterion=criterion, iterations=30),
        device=torch.device("cpu"), dtype=torch.float32, method=method,
    )  # fmt: skip


def test_the_report_counts_each_experts_tokens_and_names_those_that_got_too_few(base, make_windows, tmp_path):
    windows = make_windows(0, windows=4)
    report = step(base, tmp_path / "v", windows)
    tokens = {layer.name: layer.tokens for layer in report.layers}
    for block in range(SIZES["num_hidden_layers"]):
        prefix = f"model.layers.{block}.mlp.experts"
        assert tokens[f"model.layers.{block}.self_attn.q_proj"] == windows.numel()
        for linear in ("gate_proj", "up_proj", "down_proj"):
            routed = [tokens[f"{prefix}.{expert}.{linear}"] for expert in range(5)]
            assert sum(routed) == 2 * windows.numel()
            assert routed[IDLE] == 0
            assert f"{prefix}.{IDLE}.{linear}" in report.short
    assert set(report.short) == {layer.name for layer in report.layers if layer.tokens < layer.features}


@pytest.mark.parametrize("criterion", ["output", "gradient", "loss"])
def test_an_expert_without_tokens_is_pruned_for_the_tokens_of_its_layer(base, make_windows, tmp_path, criterion):
    found = step(base, tmp_path / "copal", make_windows(0), criterion=criterion)
    plain = step(base, tmp_path / "magnitude", make_windows(0), criterion=criterion, method=magnitude)
    idle = [layer for layer in found.layers if f"experts.{IDLE}." in layer.name]
    if criterion == "loss":  # nobody minds what it gives: it is pruned as far as a row may be
        assert {round(layer.zeros / layer.weights, 1) for layer in idle} == {0.8}
        return
    errors = {layer.name: layer.error_after for layer in plain.layers}
    assert len(idle) == 6
    assert all(0 < layer.error_after < 0.8 * errors[layer.name] for layer in idle)
    assert found.sparsity == 0.5


def test_domains_that_use_other_experts_end_with_the_same_model_in_either_order(base, make_windows, tmp_path):
    domains = {"a": make_windows(0, windows=1), "b": make_windows(1)}
    ends = []
    for order in ("ab", "ba"):
        parent = None
        for name in order:
            out = tmp_path / order / name
            step(base, out, domains[name], name=name, parent=parent)
            parent = out
        checkpoint = Checkpoint(parent / "model")
        ends.append(checkpoint.read(checkpoint.names()))
    for name, weight in ends[0].items():
        assert weight.isfinite().all()
        assert ((weight == 0) != (ends[1][name] == 0)).float().mean() <= 1e-3
        torch.testing.assert_close(weight, ends[1][name], rtol=0, atol=2e-3)


def test_the_moment_of_an_expert_counts_its_own_tokens_fully_and_a_share_of_the_others(base):
    block = load_skeleton(base).model.layers[0].mlp.to_empty(device="cpu")
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(1, 50, SIZES["hidden_size"])
    with torch.no_grad(), MomentRecorder(block, gradient=True) as recorder:
        expected_output = block(x)
    moments = recorder.moments(1.0, "block")
    _, _, index = block.gate(x)
    for number, expert in enumerate(block.experts):
        routed = (index == number).any(-1)
        share = torch.where(routed, 1.0, OTHERS_SHARE)[:, None]
        assert recorder.routed(f"experts.{number}.gate_proj") == routed.sum()
        moment = moments[f"experts.{number}.gate_proj"]
        torch.testing.assert_close(moment.second, (share * x[0]).T @ x[0] / 50)
        squares = (share * expert.up_proj(x[0]).square()).T @ x[0].square() / 50
        torch.testing.assert_close(moment.gradient[f"experts.{number}.up_proj"], squares)
        inner = torch.nn.functional.silu(expert.gate_proj(x[0])) * expert.up_proj(x[0])
        counted = share / expected_output[0].square().mean(1, keepdim=True)
        torch.testing.assert_close(moments[f"experts.{number}.down_proj"].second, (counted * inner).T @ inner / 50)
    torch.testing.assert_close(block(x), expected_output)


def test_a_forward_that_fails_inside_an_expert_leaves_no_trace(base):
    layer = load_skeleton(base).model.layers[0].mlp.to_empty(device="cpu")
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    before = torch.nn.Linear(SIZES["hidden_size"], SIZES["hidden_size"], bias=False)
    block, x = torch.nn.Sequential(before, layer), torch.randn(1, 50, SIZES["hidden_size"])
    found = []
    for fails in (False, True):
        with torch.no_grad(), MomentRecorder(block, gradient=False) as recorder:
            if fails:
                layer.experts[0].down_proj.forward = None  # type: ignore[assignment]
                with pytest.raises(TypeError):
                    block(x)
                del layer.experts[0].down_proj.forward
            block(x)
        found.append(recorder.moments(1.0, "block"))
    for group, moment in found[0].items():
        torch.testing.assert_close(found[1][group].second, moment.second)


def test_experts_in_another_layout_get_an_error_that_says_what_was_looked_for(tmp_path):
    AutoConfig.for_model("gpt_oss", num_hidden_layers=1, num_local_experts=4).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"model\.layers\.0\.mlp\.experts .* looked for experts with gate_up_proj"):
        load_skeleton(tmp_path)
