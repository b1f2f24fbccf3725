"""Replay of versions on a tiny model: identical here, and what differs is told."""

from __future__ import annotations

import json
import shutil

from flows.cli import main
from flows.gc import collect
from flows.registry import Registry
from flows.run import plain_stages, run_step, run_withdrawal


def test_a_replay_is_identical_tells_what_differs_and_needs_the_data(bench, capsys, monkeypatch, tmp_path):
    for seed, domain in enumerate(("legal", "code")):
        bench.commit(domain, seed)
        assert run_step(bench.workspace, bench.settings, bench.registry, domain, None, plain_stages())
    run_withdrawal(bench.workspace, bench.settings, bench.registry, "legal", "because", plain_stages())
    collect(bench.workspace, bench.settings, bench.registry)  # the parents' sums
    where = ["--workspace", str(bench.root)]
    assert main(["replay", "4", "--json", *where]) == 0
    assert json.loads(capsys.readouterr().out)["identical"]
    assert main(["replay", "3", "--keep", str(tmp_path / "kept"), *where]) == 0
    assert capsys.readouterr().out == "version 3 of tiny: identical, masks and weights\n"
    assert (tmp_path / "kept" / "model" / "config.json").is_file()
    assert main(["replay", "1", *where]) == 2

    real = Registry.record

    def altered(self, version):
        record = real(self, version)
        record["settings"]["prune"]["exponent"] = 0.9
        record["libraries"]["torch"] = "1.0"
        return record

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
