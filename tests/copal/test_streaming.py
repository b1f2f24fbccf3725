"""What stops a walk over a checkpoint, and what does not."""

from __future__ import annotations

import hashlib
import shutil
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.backends.cuda import cudnn_sdp_enabled, flash_sdp_enabled, mem_efficient_sdp_enabled
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers.models.llama.modeling_llama import LlamaMLP

from copal.config import CalibrationConfig, PruneConfig
from copal.errors import NumericsError, ResourceError, SmallerBatchWarning
from copal.evaluation import evaluate
from copal.state import StateReader
from copal.step import Base, NewDomain, Parent, StepReport, prune_step
from copal.streaming import StreamedModel, compute_dtype
from support.versions import Lineage, share_of_other_masks


def step(base: Path, out: Path, windows: torch.Tensor, batch: int = 8, parent: Parent | None = None) -> StepReport:
    return prune_step(
        Base(folder=base, fingerprint="base"),
        parent,
        NewDomain(name=out.name, md5="1", weight=1.0, windows=windows),
        out,
        calibration=CalibrationConfig(),
        prune=PruneConfig(criterion="gradient"),
        device=torch.device("cpu"),
        dtype=torch.float32,
        batch=batch,
    )


@contextmanager
def memory_for(windows: int, error: RuntimeError, spared: int = 0) -> Iterator[None]:
    """The MLP of a block, which runs after attention, fails for more than `windows`; the first `spared` times not."""
    calls = 0

    def forward_pre(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        nonlocal calls
        if isinstance(module, LlamaMLP) and len(args[0]) > windows:
            calls += 1
            if calls > spared:
                raise error

    hook = register_module_forward_pre_hook(forward_pre)
    try:
        yield
    finally:
        hook.remove()


ON_GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
ON_CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried")


@pytest.mark.parametrize("error", [ON_GPU, ON_CPU])
def test_memory_that_runs_out_halves_the_batch_and_counts_no_window_twice(make_model, make_windows, tmp_path, error):
    base, windows = make_model(), make_windows(0)
    with (
        memory_for(2, error, spared=1),  # a whole batch of four was counted when the second one fails
        pytest.warns(SmallerBatchWarning, match=r"model\.layers\.0 with 4 windows at a time.*model\.batch: 2"),
    ):
        step(base, tmp_path / "a", windows, batch=4)
    step(base, tmp_path / "b", windows, batch=2)
    one, other = (StateReader(tmp_path / name / "state") for name in "ab")
    for index in range(2):
        found, expected = (reader.sum(index, torch.device("cpu")) for reader in (one, other))
        for group, moment in expected.items():
            torch.testing.assert_close(found[group].total, moment.total)
            torch.testing.assert_close(found[group].gradient, moment.gradient)


def test_the_batch_changes_a_step_by_rounding_only(make_model, make_windows, tmp_path):
    base, windows = make_model(), make_windows(0)
    eight, three = (step(base, tmp_path / str(batch), windows, batch=batch) for batch in (8, 3))
    for one, other in zip(eight.layers, three.layers, strict=True):
        assert (one.name, one.zeros) == (other.name, other.zeros)
        assert one.error_after == pytest.approx(other.error_after, rel=1e-3)


def test_evaluation_goes_on_with_half_of_the_batch(make_model, make_windows, cpu):
    base, windows = make_model(), {"code": make_windows(0, windows=7)}
    expected = evaluate(base, windows, device=cpu, dtype=torch.float32)["code"]
    with memory_for(1, ON_GPU), pytest.warns(SmallerBatchWarning) as told:
        found = evaluate(base, windows, device=cpu, dtype=torch.float32)["code"]
    assert (found.nats, found.tokens) == (pytest.approx(expected.nats, rel=1e-6), expected.tokens)
    assert [str(warning.message).split(" windows")[0][-1] for warning in told] == ["7", "3"]  # then for good


def test_memory_for_less_than_one_window_names_the_setting_and_leaves_nothing(make_model, make_windows, tmp_path):
    with memory_for(0, ON_GPU), pytest.warns(SmallerBatchWarning), pytest.raises(ResourceError) as caught:
        step(make_model(), tmp_path / "out", make_windows(0))
    assert "model.layers.0 with one window at a time" in str(caught.value)
    assert "calibration.window_length" in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [ON_GPU, ON_CPU])
def test_memory_that_is_not_enough_for_the_solve_is_told_in_one_line_and_leaves_nothing(
    make_model, make_windows, tmp_path, monkeypatch, error
):
    def solve(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("copal.step.prune_group", solve)
    with pytest.raises(ResourceError, match=r"the solve of one block, .*: take a device with more"):
        step(make_model(), tmp_path / "out", make_windows(0))
    assert not list(tmp_path.iterdir())


def test_another_error_is_not_taken_for_want_of_memory(make_model, make_windows, tmp_path):
    with memory_for(0, RuntimeError("mat1 and mat2")), pytest.raises(RuntimeError, match="mat1"):
        step(make_model(), tmp_path / "out", make_windows(0))


def test_a_step_computes_where_it_is_told_whatever_else_the_machine_has(
    make_model, make_windows, tmp_path, monkeypatch
):
    here = Lineage(make_model(), tmp_path / "here", PruneConfig(criterion="loss"))
    here.add("code", make_windows(0))
    monkeypatch.setattr("copal.processes.device", lambda: torch.device("meta"))  # as a GPU that is not asked for
    there = Lineage(make_model(), tmp_path / "there", PruneConfig(criterion="loss"))
    there.add("code", make_windows(0))
    assert share_of_other_masks(here.weights(), there.weights()) == 0


@pytest.mark.parametrize(("capability", "dtype"), [(7, torch.float32), (8, torch.bfloat16)])
def test_a_gpu_that_only_emulates_bfloat16_computes_in_float32(monkeypatch, capability, dtype):
    card = types.SimpleNamespace(major=capability)
    for name, value in {
        "is_available": True, "current_device": 0, "get_device_properties": card, "_check_bf16_tensor_supported": True,
    }.items():  # fmt: skip
        monkeypatch.setattr(f"torch.cuda.{name}", lambda *_, value=value: value)
    assert compute_dtype("auto", torch.device("cuda")) == dtype


def test_on_a_gpu_attention_on_the_way_back_is_not_that_of_fused_kernels(make_model, make_windows, cpu):
    """The gradient of those is added up in any order: a step with criterion `loss` would not be made again exactly."""
    windows, kinds = make_windows(0), []
    model = StreamedModel(make_model(blocks=1), device=cpu, dtype=torch.float32)
    stream = model.start(windows, 8)

    def fused() -> tuple[bool, ...]:
        return flash_sdp_enabled(), mem_efficient_sdp_enabled(), cudnn_sdp_enabled()

    with model.block(0) as block:
        hidden = stream.hidden
        stream.advance(block)
        gradient = stream.loss_gradient()
        block.register_forward_pre_hook(lambda *_: kinds.append(fused()))
        expected = stream.backward(0, block, hidden, gradient)
        model.device = torch.device("cuda")  # nothing is moved there
        found = stream.backward(0, block, hidden, gradient)
    assert kinds == [fused(), (False, False, False)]
    # Beside the whole: where terms cancel, other kernels round a single number further away than float32's own step.
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def broken(base: Path, folder: Path, name: str, value: float) -> Path:
    """A copy of `base` with `value` in its tensor `name`."""
    shutil.copytree(base, folder)
    weights = load_file(folder / "model.safetensors")
    weights[name].view(-1)[5] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("tensor", "value", "where"),
    [
        ("model.layers.1.self_attn.v_proj.weight", torch.nan, r"comes out of model\.layers\.1\.self_attn\.v_proj"),
        ("model.layers.2.mlp.up_proj.weight", torch.inf, r"comes out of model\.layers\.2\.mlp\.up_proj"),
        ("model.layers.0.input_layernorm.weight", torch.inf, r"comes out of model\.layers\.0\.input_layernorm"),
    ],
)
def test_what_is_not_finite_stops_step_and_evaluation_at_its_layer_and_touches_no_state(
    make_model, make_windows, tmp_path, cpu, tensor, value, where
):
    base, windows = make_model(blocks=3), make_windows(0)
    step(base, tmp_path / "v2", windows)
    before = digests(tmp_path / "v2")
    parent = Parent(version=2, model=tmp_path / "v2" / "model", state=tmp_path / "v2" / "state", states={})
    bad = broken(base, tmp_path / "bad", tensor, value)
    with pytest.raises(NumericsError, match=where):
        step(bad, tmp_path / "v3", make_windows(1), parent=parent)
    assert digests(tmp_path / "v2") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "v2"]
    with pytest.raises(NumericsError, match=f"on code: .*{where}"):
        evaluate(bad, {"code": windows}, device=cpu, dtype=torch.float32)


def test_a_token_whose_embedding_is_not_finite_is_found_before_the_first_block(make_model, make_windows, tmp_path, cpu):
    bad = broken(make_model(), tmp_path / "bad", "model.embed_tokens.weight", torch.nan)  # of token 0
    windows = make_windows(0)
    windows[3, 0] = 0
    with pytest.raises(NumericsError, match="embeddings hold NaN"):
        evaluate(bad, {"code": windows}, device=cpu, dtype=torch.float32)


def test_a_head_that_is_not_finite_is_named(make_model, make_windows, tmp_path, cpu):
    bad = broken(make_model(), tmp_path / "bad", "model.norm.weight", torch.inf)
    with pytest.raises(NumericsError, match=r"on code: the loss .* last norm"):
        evaluate(bad, {"code": make_windows(0)}, device=cpu, dtype=torch.float32)


def test_a_domain_is_read_without_the_head_which_may_be_wider_than_all_blocks(make_model, make_windows, tmp_path):
    """Logits of a batch that nobody wanted took 4 GB of a model with 256,000 words."""
    seen = []
    hook = register_module_forward_pre_hook(
        lambda module, _: seen.append(module) if getattr(module, "out_features", 0) == 128 else None
    )
    try:
        step(make_model(hidden=48), tmp_path / "out", make_windows(0))
    finally:
        hook.remove()
    assert seen == []
