"""The script for a GPU, tried on the CPU; and its checks as tests, where there is a GPU."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import time
import venv
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from copal.streaming import compute_dtype
from gpu import checks, part, run

pytestmark = pytest.mark.slow
WANTED = ("torch", "transformers", "safetensors", "accelerate")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", checks.checks(part.FULL.architectures))
def test_a_gpu_does_what_the_cpu_does(name: str, tmp_path: Path) -> None:
    device = torch.device("cuda")
    setting = part.Setting(
        device=device, dtype=compute_dtype("auto", device), sizes=part.FULL, scratch=tmp_path, until=time.time() + 600
    )
    left_out = checks.checks(part.FULL.architectures)[name](setting)
    if left_out:
        pytest.skip(left_out)


def environment(folder: Path, names: tuple[str, ...]) -> Path:
    """The Python of a virtual environment that has the packages `names`, what they require, and nothing else."""
    venv.create(folder, with_pip=False)
    (site,) = (folder / "lib").glob("python*/site-packages")
    known, open_ = set[str](), list(names)
    while open_:
        name = open_.pop()
        if name in known:
            continue
        known.add(name)
        distribution = importlib.metadata.distribution(name)
        requirements = [Requirement(line) for line in distribution.requires or ()]
        open_ += [one.name for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]
        tops = {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}
        for top in tops:
            if not (site / top).exists():
                (site / top).symlink_to(str(distribution.locate_file(top)))
    return folder / "bin" / "python"


def tables(text: str) -> dict[str, list[dict[str, str]]]:
    """Title -> rows, of the tables of a report that have one; every row has a cell for each column."""
    found = {}
    for title, lines in re.findall(r"^(.+):\n\n((?:\|.*\n)+)", text, re.MULTILINE):
        columns, rule, *rows = [line[2:-2].split(" | ") for line in lines.splitlines()]
        assert set(rule) == {"---"}
        found[title] = [dict(zip(columns, row, strict=True)) for row in rows]
    return found


def test_the_script_needs_a_few_packages_only_and_tells_every_part(tmp_path: Path) -> None:
    python, out, scratch = environment(tmp_path / "venv", WANTED), tmp_path / "gpu.md", tmp_path / "scratch"
    done = subprocess.run(
        [
            python, run.__file__, "--shape", "tiny", "--one-process", "--out", out, "--scratch", scratch,
            *("--parts", "checks", "semi_structured", "ratios", "step"),
        ],
        capture_output=True, text=True, env={"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(scratch.iterdir()) == []
    text = out.read_text()
    assert f"| torch | {torch.__version__} |" in text
    assert "| card | none: the CPU |" in text
    assert "**Tried with tiny shapes: nothing here says how fast anything is.**" in text
    assert re.findall(r"^## (.+)\n\n(Done), in \d+ s\.", text, re.MULTILINE) == [
        (one.title, "Done") for one in run.PARTS if one.name != "together"
    ]
    found = tables(text)
    results = {row["check"]: row["result"] for row in found["The GPU against the CPU"]}
    assert list(results) == list(checks.checks(part.TINY.architectures))
    assert {name for name, result in results.items() if result != "ok"} == {
        "memory that runs out halves the batch", "torch takes 2:4 weights",
    }  # fmt: skip
    assert {row["kernel"] for row in found["Products"]} == {"dense"}
    assert [row[""] for row in found["Ratios"]] == [
        "statistics, output", "statistics, loss", "solve", "tenth step", "tenth evaluation",
    ]  # fmt: skip
    steps = [row for row in found["Seconds and memory of a step"] if row["blocks"].endswith("measured")]
    assert [(row["blocks"][0], row["criterion"], row["step"]) for row in steps] == [
        ("1", "output", "1"), ("1", "output", "2"), ("1", "loss", "1"), ("1", "loss", "2"),
        ("2", "output", "1"), ("2", "loss", "1"),
    ]  # fmt: skip
    assert all(row["zeros"] == "0.5000" for row in steps)
    scaled = [row["blocks"] for row in found["Seconds and memory of a step"] if row not in steps]
    assert scaled == ["2, that times 2"] * 4
    measured, of_all = found["The solve against SparseGPT, the same matrices and statistics"]
    assert (measured["blocks"], of_all["blocks"]) == ("1, measured", "2, that times 2")


def test_a_python_without_the_packages_is_told_which(tmp_path: Path) -> None:
    python = environment(tmp_path / "venv", ("safetensors",))
    done = subprocess.run([python, run.__file__, "--out", tmp_path / "gpu.md"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "has no torch, transformers, accelerate, numpy: install that" in done.stderr
    assert not (tmp_path / "gpu.md").exists()


def test_without_a_gpu_nothing_large_is_begun(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    asked = ["part.py", "step", "--shape", "full", "--told", ".", "--scratch", ".", "--until", "0"]
    monkeypatch.setattr("sys.argv", asked)
    monkeypatch.chdir(tmp_path)
    assert part.main() == run.NO_GPU
    assert "--shape tiny tries the script on the CPU" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("then", "end", "failed"),
    [
        ("sleep 60", "Left: stopped, for its 2 s were up.", False),
        ("echo CUDA error: misaligned address >&2; exit 1", "FAILED with exit code 1: CUDA error: misaligned", True),
        ("kill -9 $$", "FAILED with exit code -9", True),
    ],
)
def test_a_part_that_is_stopped_or_fails_has_told_what_it_had_found(tmp_path, monkeypatch, then, end, failed) -> None:
    told = part.Told(tmp_path / "step.json", {"card": "a card"})
    told.row("Seconds", {"blocks": "4", "seconds": "1.5"})
    python = tmp_path / "python"  # in place of the one that runs the part
    python.write_text(f"#!/bin/sh\n{then}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    outcomes = run.run_parts((run.PARTS[-1],), "full", tmp_path, 2)
    assert outcomes is not None
    assert outcomes[0].end.startswith(end)
    assert outcomes[0].failed == failed
    text = run.report("full", outcomes, 3.0)
    assert tables(text)["Seconds"] == [{"blocks": "4", "seconds": "1.5"}]
    assert "| card | a card |" in text
    assert end in text
