"""The Fisher information of outputs is that of autograd on the whole model, however the model is walked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from copal.architecture import find_linears
from copal.config import CalibrationConfig, PruneConfig
from copal.errors import NumericsError
from copal.labels import chances, draw
from copal.state import StateReader
from copal.step import Base, NewDomain, prune_step

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 128,
    "initializer_range": 0.3,
}  # fmt: skip
WRITERS = ("o_proj", "down_proj", "dense", "dense_4h_to_h")


def of_the_whole_model(folder: Path, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """sum (dL/dy)^2 / sum rho of every linear of the blocks, a window at a time through transformers' own model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    blocks = model.model.layers if hasattr(model, "model") else model.gpt_neox.layers
    prefix = "model.layers" if hasattr(model, "model") else "gpt_neox.layers"
    outputs: dict[str, torch.Tensor] = {}
    hidden: dict[int, torch.Tensor] = {}
    linears = {
        (index, name): linear for index, block in enumerate(blocks) for name, linear in find_linears(block).items()
    }

    def keep(key, y: torch.Tensor) -> None:
        y.retain_grad()
        outputs[key] = y

    for key, linear in linears.items():
        linear.register_forward_hook(lambda _, __, y, key=key: keep(key, y))
    for index, block in enumerate(blocks):
        block.register_forward_hook(
            lambda _, __, y, index=index: hidden.__setitem__(index, y[0] if isinstance(y, tuple) else y)
        )
    sums, counted = dict.fromkeys(linears, 0.0), dict.fromkeys(linears, 0.0)
    for window in windows.split(1):
        logits = model(window).logits
        labels = draw(logits[0].detach().softmax(-1), chances(window[0]))
        F.cross_entropy(logits[0], labels, reduction="sum").backward()
        for (index, name), y in outputs.items():
            rho = torch.ones(len(y[0]))
            if name.endswith(WRITERS) and y.shape[-1] == 32:
                rho = hidden[index].detach()[0].square().mean(1).reciprocal()
            sums[index, name] = sums[index, name] + y.grad[0].square().sum(0)
            counted[index, name] += rho.sum()
    return {f"{prefix}.{index}.{name}": total / counted[index, name] for (index, name), total in sums.items()}


def step(folder: Path, windows: torch.Tensor, out: Path, cpu: torch.device, batch: int = 3) -> None:
    prune_step(
        Base(folder=folder, fingerprint="-"), None, NewDomain(name="a", md5="-", weight=2.0, windows=windows), out,
        calibration=CalibrationConfig(window_length=32), prune=PruneConfig(criterion="loss"), device=cpu,
        dtype=torch.float32, batch=batch,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "more"),
    [("llama", {"num_key_value_heads": 2}), ("gpt_neox", {"use_parallel_residual": True})],
)
def test_what_a_step_stores_is_what_autograd_says_of_the_whole_model(kind, more, make_windows, tmp_path, cpu) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL, **more)).save_pretrained(tmp_path / "base")
    windows = make_windows(0, windows=5)
    step(tmp_path / "base", windows, tmp_path / "v", cpu)
    state = StateReader(tmp_path / "v" / "state")
    (entry,) = state.manifest.domains
    expected = of_the_whole_model(tmp_path / "base", windows)
    for found in (state.fisher(entry, cpu), state.fisher_sum(cpu)):
        assert found.keys() == expected.keys()
        for name, fisher in found.items():
            torch.testing.assert_close(fisher, 2.0 * expected[name], rtol=1e-3, atol=1e-7, msg=name)


def test_an_expert_is_told_by_the_tokens_that_are_routed_to_it(make_windows, tmp_path, cpu) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("mixtral", **SMALL, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    model = AutoModelForCausalLM.from_config(config)
    model.model.layers[1].mlp.gate.weight.data[3] = -model.model.layers[1].mlp.gate.weight.data[:3].sum(0)
    model.save_pretrained(tmp_path / "base")
    step(tmp_path / "base", make_windows(0, windows=4), tmp_path / "v", cpu)
    found = StateReader(tmp_path / "v" / "state").fisher_sum(cpu)
    experts = {name: fisher for name, fisher in found.items() if ".experts." in name}
    assert len(experts) == 3 * 4 * 3
    assert all((fisher >= 0).all() and fisher.isfinite().all() for fisher in found.values())
    assert sum(bool((fisher > 0).all()) for fisher in experts.values()) >= 3 * 3 * 3


def test_how_many_windows_run_at_a_time_changes_nothing(make_model, make_windows, tmp_path, cpu) -> None:
    base, windows = make_model(), make_windows(0, windows=4)
    found = []
    for batch in (1, 4):
        step(base, windows, tmp_path / str(batch), cpu, batch=batch)
        found.append(StateReader(tmp_path / str(batch) / "state").fisher_sum(cpu))
    for name, fisher in found[0].items():
        torch.testing.assert_close(fisher, found[1][name], rtol=1e-4, atol=0)


def test_a_gradient_that_is_not_finite_names_the_linear(make_model, make_windows, tmp_path, cpu, monkeypatch) -> None:
    from copal.streaming import Stream

    real = Stream.loss_gradient
    monkeypatch.setattr(Stream, "loss_gradient", lambda stream: real(stream) * torch.inf)
    with pytest.raises(NumericsError, match=r"gradient of the loss at model\.layers\.1\.self_attn\.q_proj"):
        step(make_model(), make_windows(0, windows=2), tmp_path / "v", cpu)
    assert list(tmp_path.iterdir()) == []
