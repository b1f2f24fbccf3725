from __future__ import annotations

import shutil
from itertools import permutations
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from copal.config import CalibrationConfig, PruneConfig
from copal.errors import ModelError, StateError
from copal.evaluation import evaluate
from copal.step import Base
from support.versions import COMPACT, Lineage, share_of_other_masks


@pytest.fixture
def dialects(make_windows):
    return {name: make_windows(seed) for seed, name in enumerate(("code", "legal", "medical"))}


@pytest.mark.parametrize("criterion", ["output", "loss"])
def test_all_six_orders_end_with_the_same_model_which_is_that_of_all_data_at_once(
    make_model, dialects, tmp_path, cpu, criterion
):
    base, prune = make_model(), PruneConfig(criterion=criterion, iterations=30)
    at_once = Lineage(base, tmp_path / "at-once", prune)
    at_once.add("all", torch.cat(list(dialects.values())))
    first, expected = None, None
    for order in permutations(dialects):
        lineage = Lineage(base, tmp_path / "-".join(order), prune)
        for name in order:
            lineage.add(name, dialects[name])
        found = evaluate(lineage.model, dialects, device=cpu, dtype=torch.float32)
        first, expected = first or lineage.weights(), expected or found
        assert share_of_other_masks(lineage.weights(), first) <= 1e-5
        # Each contribution is rounded to 16 bits by itself: scores that are all but equal may change places. What
        # tokens count in the Fisher information of a linear that writes to the residual stream is averaged by domain.
        most = {"output": 3e-4, "loss": 1e-3}[criterion]
        assert share_of_other_masks(lineage.weights(), at_once.weights()) <= most
        for name in dialects:
            assert found[name].perplexity == pytest.approx(expected[name].perplexity, rel=1e-3)


@pytest.mark.parametrize("criterion", ["output", "gradient", "loss"])
def test_weights_that_an_earlier_step_pruned_come_back_and_the_count_is_right(
    make_model, dialects, tmp_path, criterion
):
    lineage = Lineage(make_model(), tmp_path, PruneConfig(criterion=criterion))
    first = lineage.add("code", dialects["code"])
    before = lineage.weights()
    second = lineage.add("legal", dialects["legal"])
    after = lineage.weights()
    back = sum(int(((before[name] == 0) & (after[name] != 0)).sum()) for name in before)
    assert first.weights_back == 0
    assert second.weights_back == back > 0
    assert second.sparsity == sum(int((w == 0).sum()) for w in after.values()) / sum(w.numel() for w in after.values())
    assert second.sparsity == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("criterion", ["output", "loss"])
def test_a_new_version_of_a_domain_replaces_the_old_one_as_if_that_had_never_been(
    make_model, dialects, tmp_path, criterion
):
    base, prune = make_model(), PruneConfig(criterion=criterion, iterations=30)
    replaced, never = Lineage(base, tmp_path / "replaced", prune), Lineage(base, tmp_path / "never", prune)
    replaced.add("code", dialects["code"], md5="A")
    replaced.add("legal", dialects["legal"])
    replaced.add("code", dialects["medical"], md5="B")
    never.add("legal", dialects["legal"])
    never.add("code", dialects["medical"], md5="B")
    assert share_of_other_masks(replaced.weights(), never.weights()) <= 1e-4
    assert [(entry.name, entry.md5) for entry in replaced.manifest.domains] == [("code", "B"), ("legal", "1")]

    replaced.add("code", dialects["code"], md5="A")  # and back again
    back = Lineage(base, tmp_path / "back", prune)
    back.add("code", dialects["code"], md5="A")
    back.add("legal", dialects["legal"])
    assert share_of_other_masks(replaced.weights(), back.weights()) <= 1e-4


def test_the_only_domain_may_be_replaced(make_model, dialects, tmp_path):
    lineage, fresh = Lineage(make_model(), tmp_path / "a"), Lineage(make_model(), tmp_path / "b")
    lineage.add("code", dialects["code"], md5="A")
    lineage.add("code", dialects["legal"], md5="B")
    fresh.add("code", dialects["legal"], md5="B")
    assert share_of_other_masks(lineage.weights(), fresh.weights()) == 0


def test_a_heavier_domain_is_kept_better(make_model, dialects, tmp_path):
    errors = {}
    for weight in (1.0, 8.0):
        lineage = Lineage(make_model(), tmp_path / str(weight))
        lineage.add("code", dialects["code"])
        report = lineage.add("legal", dialects["legal"], weight=weight)
        errors[weight] = sum(layer.error_after for layer in report.layers)
    assert errors[8.0] < errors[1.0]


def test_the_report_tells_how_the_new_domain_meets_the_model(make_model, dialects, tmp_path):
    lineage = Lineage(make_model(), tmp_path)
    first = lineage.add("code", dialects["code"])
    second = lineage.add("legal", dialects["legal"])
    assert all(layer.error_before is None and layer.response_shift is None for layer in first.layers)
    assert [layer.name for layer in second.layers][:2] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.k_proj",
    ]
    assert all(0 < layer.error_after < layer.error_before for layer in second.layers)
    assert all(layer.response_shift > 0 for layer in second.layers)


def test_the_pruned_folder_loads_with_from_pretrained_and_differs_in_the_linears_only(make_model, dialects, tmp_path):
    base = make_model()
    lineage = Lineage(base, tmp_path)
    lineage.add("code", dialects["code"])
    dense = AutoModelForCausalLM.from_pretrained(base).state_dict()
    pruned = AutoModelForCausalLM.from_pretrained(lineage.model).state_dict()
    assert dense.keys() == pruned.keys()
    changed = {name for name in dense if not torch.equal(dense[name], pruned[name])}
    assert changed == {name for name in dense if "layers" in name and dense[name].ndim == 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": Base(folder=Path(), fingerprint="other")}, "another base model"),
        ({"calibration": CalibrationConfig(window_length=32, windows=9)}, "other calibration settings"),
        ({"calibration": COMPACT}, "other calibration settings"),
        ({"prune": PruneConfig(criterion="gradient")}, r"made with prune\.criterion loss"),
    ],
)
def test_a_state_of_another_base_or_other_settings_is_refused(make_model, dialects, tmp_path, change, message):
    lineage = Lineage(make_model(), tmp_path)
    lineage.add("code", dialects["code"])
    if "base" in change:
        lineage.base = Base(folder=lineage.base.folder, fingerprint="other")
    lineage.calibration = change.get("calibration", lineage.calibration)
    lineage.prune = change.get("prune", lineage.prune)
    with pytest.raises(StateError, match=message):
        lineage.add("legal", dialects["legal"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v2"]


def test_a_state_with_gradient_statistics_is_not_mixed_with_one_without(make_model, dialects, tmp_path):
    lineage = Lineage(make_model(), tmp_path, PruneConfig(criterion="gradient"))
    lineage.add("code", dialects["code"])
    lineage.prune = PruneConfig(criterion="output")
    with pytest.raises(StateError, match=r"made with prune\.criterion gradient"):
        lineage.add("legal", dialects["legal"])


def test_a_damaged_state_is_named_and_nothing_is_left_behind(make_model, dialects, tmp_path):
    lineage = Lineage(make_model(), tmp_path)
    lineage.add("code", dialects["code"])
    shard = tmp_path / "v2" / "state" / "sum" / "block-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(StateError, match=r"block-00001\.safetensors is damaged"):
        lineage.add("legal", dialects["legal"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v2"]


def test_the_state_of_a_later_version_needs_the_sum_only(make_model, dialects, tmp_path):
    lineage = Lineage(make_model(), tmp_path)
    lineage.add("code", dialects["code"])
    shutil.rmtree(tmp_path / "v2" / "state" / "contribution")
    lineage.add("legal", dialects["legal"])
    assert [entry.version for entry in lineage.manifest.domains] == [2, None]


def test_the_order_does_not_matter_with_compact_storage_either(make_model, dialects, tmp_path):
    base, ends = make_model(hidden=128), []
    for order in permutations(dialects):
        lineage = Lineage(base, tmp_path / "-".join(order))
        lineage.calibration = COMPACT
        for name in order:
            lineage.add(name, dialects[name])
        ends.append(lineage.weights())
    assert all(share_of_other_masks(ends[0], end) <= 1e-4 for end in ends)
    full = Lineage(base, tmp_path / "full")
    for name in dialects:
        full.add(name, dialects[name])
    assert 0 < share_of_other_masks(ends[0], full.weights()) < 0.2


@pytest.mark.parametrize(("criterion", "file"), [("output", "block-00000"), ("loss", "fisher")])
def test_a_sum_that_was_dropped_is_made_again_from_contributions(make_model, dialects, tmp_path, criterion, file):
    base, prune = make_model(), PruneConfig(criterion=criterion, iterations=30)
    whole, dropped = Lineage(base, tmp_path / "whole", prune), Lineage(base, tmp_path / "dropped", prune)
    for lineage in (whole, dropped):
        lineage.add("code", dialects["code"])
        lineage.add("legal", dialects["legal"], weight=2.0)
    (tmp_path / "dropped" / "v3" / "state" / "sum" / f"{file}.safetensors").unlink()  # one block's is enough
    for lineage in (whole, dropped):
        lineage.add("medical", dialects["medical"])
    assert share_of_other_masks(whole.weights(), dropped.weights()) <= 1e-4


def test_a_pattern_holds_in_every_group_of_every_exported_linear(make_model, dialects, tmp_path):
    lineage = Lineage(make_model(), tmp_path, prune=PruneConfig(sparsity="2:4"))
    report = lineage.add("code", dialects["code"])
    lineage.add("legal", dialects["legal"])
    assert report.sparsity == 0.5
    assert {layer.damping for layer in report.layers} == {0.1}
    for name, weight in lineage.weights().items():
        kept = (weight != 0).reshape(-1, 4).sum(1)
        assert (kept == 2).all() or "embed" in name


def test_a_pattern_that_the_rows_cannot_hold_is_refused_with_the_layer(make_model, dialects, tmp_path):
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.q_proj has 32 input features, no multiple of 3"):
        Lineage(make_model(), tmp_path, prune=PruneConfig(sparsity="1:3")).add("code", dialects["code"])
    assert not any(tmp_path.iterdir())
