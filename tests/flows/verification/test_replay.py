"""Replay of versions on a tiny model: identical here, and what differs is told."""

from __future__ import annotations

import json
import shutil
from functools import partial

from flows.cli import main
from flows.registry.registry import Registry
from flows.step.gc import collect
from flows.step.run import plain_tasks, run_withdrawal
from support.toys import step


def test_a_replay_is_identical_tells_what_differs_and_needs_the_data(bench, capsys, monkeypatch, tmp_path):
    for seed, domain in enumerate(("legal", "code", "legal")):  # legal comes with other data
        bench.commit(domain, seed)
        step(bench, domain)
    bench.commit("prose", 7)
    step(bench, "prose")
    withdraw = partial(run_withdrawal, bench.project, "code", "because")
    withdraw(plain_tasks())
    collect(bench.project)  # the parents' sums
    where = ["--workspace", str(bench.root)]
    for number in ("4", "6"):
        assert main(["replay", number, "--last-step", "--json", *where]) == 0
        assert json.loads(capsys.readouterr().out)["identical"]
    withdraw(plain_tasks(), purge=True)
    assert main(["replay", "5", "--last-step", *where]) == 2
    assert "contribution" in capsys.readouterr().err
    for number in ("2", "4", "6"):  # needs nothing of a state, only base and data
        assert main(["replay", number, "--json", *where]) == 0
        assert json.loads(capsys.readouterr().out)["identical"]
    assert main(["replay", "5", "--keep", str(tmp_path / "kept"), *where]) == 0
    assert capsys.readouterr().out == "version 5 of tiny: identical, masks and weights\n"
    assert (tmp_path / "kept" / "model" / "config.json").is_file()
    assert not list(bench.workspace.runs.iterdir())
    assert main(["replay", "1", *where]) == 2

    real = Registry.record

    def altered(self, version):
        record = real(self, version)
        prune = record.settings["prune"] | {"exponent": 0.9}
        changes = {"settings": record.settings | {"prune": prune}, "libraries": record.libraries | {"torch": "1.0"}}
        return record.model_copy(update=changes)

    with monkeypatch.context() as patch:
        patch.setattr(Registry, "record", altered)
        assert main(["replay", "3", "--json", *where]) == 1
        found = json.loads(capsys.readouterr().out)
    assert 0 < found["masks_differ"] < 0.5
    assert found["largest_difference"] > 0
    assert found["surroundings"]["libraries.torch"][0] == "1.0"

    bench.lose_data()
    for copy in bench.workspace.cache.glob("*.dir"):
        shutil.rmtree(copy)
    capsys.readouterr()
    assert main(["replay", "3", *where]) == 2
    assert capsys.readouterr().err.strip().count("\n") == 0


def test_where_the_loss_decides_a_replay_is_identical_too(bench, capsys):
    bench.set("prune: {iterations: 30}", "prune: {iterations: 30, criterion: loss}")
    for seed, domain in enumerate(("legal", "code", "prose")):
        bench.commit(domain, seed)
        step(bench, domain)
    run_withdrawal(bench.project, "code", "because", plain_tasks())
    collect(bench.project)  # the parents' sums
    shares = {layer.sparsity for layer in bench.registry.record(bench.registry.version(4)).layers}
    assert len(shares) > 1
    for number in ("4", "5"):
        assert main(["replay", number, "--json", "--workspace", str(bench.root)]) == 0
        assert json.loads(capsys.readouterr().out)["identical"]
