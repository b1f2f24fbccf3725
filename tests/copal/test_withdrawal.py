"""Taking a domain out of the state: what is left is what a lineage that never had it knows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from copal.config import PruneConfig
from copal.errors import StateError
from copal.state import StateReader
from copal.step import read_report
from copal.streaming import Stream
from support.versions import COMPACT, Lineage, share_of_other_masks


@pytest.fixture
def dialects(make_windows):
    return {name: make_windows(seed) for seed, name in enumerate(("code", "legal", "medical"))}


def lineage(base: Path, folder: Path, dialects, names: str, **more) -> Lineage:
    made = Lineage(base, folder, **more)
    for name in names.split():
        made.add(name, dialects[name])
    return made


@pytest.mark.parametrize("criterion", ["output", "gradient", "loss"])
@pytest.mark.parametrize("gone", ["code", "legal", "medical"])
def test_without_a_domain_is_as_if_it_had_never_been_seen(make_model, dialects, tmp_path, gone, criterion):
    base, prune = make_model(), PruneConfig(criterion=criterion)
    one = lineage(base, tmp_path / "one", dialects, "code legal medical", prune=prune)
    report = one.withdraw(gone)
    rest = " ".join(name for name in dialects if name != gone)
    never = lineage(base, tmp_path / "never", dialects, rest, prune=prune)

    found, expected = one.weights(), never.weights()
    assert all(torch.equal(found[name], expected[name]) for name in expected)  # they came in the same order
    reader, of_never = StateReader(one.parent.state), StateReader(never.parent.state)
    for index in range(2):
        sums = reader.sum(index, one.device), of_never.sum(index, one.device)
        assert all(torch.equal(sums[0][group].total, sums[1][group].total) for group in sums[1])
    assert [entry.name for entry in reader.manifest.domains] == rest.split()
    assert None not in [entry.version for entry in reader.manifest.domains]
    assert not list((one.parent.state / "contribution").iterdir())
    assert report.sparsity == pytest.approx(0.5, abs=1e-6)
    assert report.weights_back > 0
    assert report.short == ()
    errors = [(layer.error_before, layer.error_after) for layer in report.layers]
    assert sum(after for _, after in errors) < sum(before for before, _ in errors)
    assert [layer.name for layer in report.layers] == [
        layer.name for layer in read_report(tmp_path / "never/v3").layers
    ]
    assert read_report(one.parent.model.parent) == report


def test_another_order_ends_within_the_tolerance_of_order(make_model, dialects, tmp_path):
    base = make_model(hidden=64)
    one = lineage(base, tmp_path / "one", dialects | {"prose": dialects["code"].flip(1)}, "prose legal medical code")
    one.withdraw("legal")
    never = lineage(base, tmp_path / "never", dialects | {"prose": dialects["code"].flip(1)}, "code medical prose")
    assert share_of_other_masks(one.weights(), never.weights()) <= 1e-4


def test_no_window_of_a_domain_runs_through_the_model(make_model, dialects, tmp_path, monkeypatch):
    one = lineage(make_model(), tmp_path, dialects, "code legal")
    seen = []
    real = Stream.__init__
    monkeypatch.setattr(Stream, "__init__", lambda self, model, windows, batch: [
        seen.append(tuple(windows.shape)), real(self, model, windows, batch)][1])  # fmt: skip
    one.withdraw("code")
    assert seen == [(1, 8)]  # made-up tokens


def test_a_domain_may_come_back_after_it_went_and_sums_may_be_dropped(make_model, dialects, tmp_path):
    base = make_model()
    one = lineage(base, tmp_path / "one", dialects, "code legal")
    one.withdraw("code")
    (one.parent.state / "sum" / "block-00000.safetensors").unlink()
    one.add("medical", dialects["medical"])
    one.add("code", dialects["code"])
    other = lineage(base, tmp_path / "other", dialects, "legal medical code")
    found, expected = one.weights(), other.weights()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_with_compact_storage_too(make_model, dialects, tmp_path):
    base, ends = make_model(hidden=128), []
    for names in ("code legal medical", "code medical"):
        made = Lineage(base, tmp_path / names.replace(" ", "-"))
        made.calibration = COMPACT
        for name in names.split():
            made.add(name, dialects[name])
        if "legal" in names:
            made.withdraw("legal")
        ends.append(made.weights())
    assert share_of_other_masks(*ends) == 0


@pytest.mark.parametrize("gone", ["code", "legal"])
def test_the_only_domain_and_an_unknown_one_are_refused(make_model, dialects, tmp_path, gone):
    one = lineage(make_model(), tmp_path, dialects, "code")
    with pytest.raises(StateError, match=f"{gone} cannot go"):
        one.withdraw(gone)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v2"]


def test_a_sum_made_anew_is_the_same_to_the_last_bit(make_model, dialects, tmp_path):
    """Though the domains came in another order than that of their names."""
    one = lineage(make_model(), tmp_path, dialects, "medical code legal")
    kept = {path.name: path.read_bytes() for path in (one.parent.state / "sum").iterdir()}
    for path in (one.parent.state / "sum").iterdir():
        path.unlink()
    parent, before = one.parent, one.number
    one.add("prose", dialects["code"].flip(1))
    without = one.weights()
    for name, data in kept.items():
        (parent.state / "sum" / name).write_bytes(data)
    one.parent, one.number, one.folder = parent, before, tmp_path / "again"
    one.add("prose", dialects["code"].flip(1))
    assert all(torch.equal(without[name], weight) for name, weight in one.weights().items())
