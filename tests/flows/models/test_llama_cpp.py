"""llama.cpp takes an exported version of the real model: its converter and a build of its server, both from PyPI."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader, dequantize
from transformers import AutoModelForCausalLM, AutoTokenizer

from flows.cli import main
from flows.models.base import BaseModel
from flows.start.domains import build_domain
from flows.step.run import plain_tasks, run_step
from support.benches import Bench
from support.pages import blocks, commands

ROOT = Path(__file__).parents[3]
RUNTIME = "xllamacpp==2026.10.11549"
ASK = ROOT / "tests" / "support" / "llama_cpp.py"
PROMPTS = ("def read_file(path):\n    ", "The tenant shall pay the rent", "Acute otitis media is")
TOKENS = 24

pytestmark = [pytest.mark.real_model, pytest.mark.soak]


@pytest.fixture(scope="module")
def page() -> list[list[str]]:
    """The commands of docs/using.md: install the converter, export, convert."""
    using = (ROOT / "docs" / "using.md").read_text(encoding="utf-8")
    (block,) = [block for block in blocks(using, "sh") if "convert_hf_to_gguf" in block]
    return commands(block)


@pytest.fixture(scope="module")
def folder(page: list[list[str]], real_base: BaseModel, make_bench: Callable[..., Bench], tmp_path_factory) -> Path:
    """The folder `exported` with a version after one step, on few windows, and `llama` with llama.cpp."""
    folder = tmp_path_factory.mktemp("llama")
    bench = make_bench(folder / "workspace", real_base.folder)
    bench.set("iterations: 30", "iterations: 1")
    build_domain("legal", bench.root / "data" / "legal")
    bench.track("legal")
    assert run_step(bench.project, "legal", None, plain_tasks())
    install, export, _ = page
    subprocess.run([sys.executable, "-m", *install, RUNTIME], cwd=folder, check=True)
    with contextlib.chdir(folder):
        assert main([*export[1:], "--workspace", str(bench.root)]) == 0
    return folder


def python(folder: Path, *arguments: str) -> str:
    """What Python prints with llama.cpp on its path."""
    environment = {**os.environ, "PYTHONPATH": str(folder / "llama")}
    command = [sys.executable, "-P", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def zeros_of_blocks(file: Path) -> tuple[int, int]:
    """Zeros among the weights of the linears of a GGUF file's blocks, and how many weights these are."""
    tensors = [one for one in GGUFReader(file).tensors if one.name.startswith("blk.") and len(one.shape) == 2]
    zeros = [int((dequantize(one.data, one.tensor_type) == 0).sum()) for one in tensors]
    return sum(zeros), sum(int(one.n_elements) for one in tensors)


@pytest.mark.parametrize(("kind", "moved"), [("bf16", 0.03), ("f16", 0.03), ("q8_0", 0.15)])
def test_llama_cpp_converts_an_exported_version_and_says_what_transformers_says(
    page: list[list[str]], folder: Path, kind: str, moved: float
) -> None:
    file = folder / "exported.gguf"
    convert = page[2][1:]
    convert[convert.index("--outtype") + 1] = kind
    python(folder, *convert)
    answers = json.loads(python(folder, str(ASK), str(file), str(TOKENS), *PROMPTS).splitlines()[-1])

    tokenizer = AutoTokenizer.from_pretrained(folder / "exported")
    assert [answer["read"] for answer in answers] == [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    model = AutoModelForCausalLM.from_pretrained(folder / "exported", dtype=torch.float32)
    elsewhere, likeliest = 0.0, 0
    for answer in answers:
        with torch.no_grad():
            said = model(torch.tensor([answer["read"] + answer["said"]])).logits[0, len(answer["read"]) - 1 : -1]
        likeliest += int((said.argmax(-1) == torch.tensor(answer["said"])).sum())
        probabilities = torch.tensor(answer["nats"]).exp()
        elsewhere = max(elsewhere, (probabilities - said[0].softmax(-1)).abs().sum().item() / 2)
    assert elsewhere < moved  # of the probability of the next token; by the dense base's file 0.5 of a pruned model's
    assert likeliest >= 0.85 * TOKENS * len(PROMPTS)  # by the dense base's file two thirds

    weights = [weight for name, weight in model.model.layers.named_parameters() if "_proj" in name]
    zeros, count = sum(int((weight == 0).sum()) for weight in weights), sum(weight.numel() for weight in weights)
    kept, counted = zeros_of_blocks(file)
    assert counted == count
    assert 0.499 * count < zeros <= kept < 1.0001 * zeros
    size = file.stat().st_size / 1e6
    figures = f"{size:.0f} MB, {kept - zeros} zeros more than {zeros}, {elsewhere:.3f} moved"
    print(f"\n{kind}: {figures}, {likeliest} of {TOKENS * len(PROMPTS)} tokens are the likeliest")
