"""What a step takes, held to steps that were taken: bytes of files, peak memory, operations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import AutoModelForCausalLM

from copal.checkpoint import save_shard
from copal.config import CalibrationConfig, PruneConfig
from copal.estimate import Estimate, estimate_step
from copal.evaluation import evaluate
from copal.known import config_folder
from copal.meter import Meter
from copal.shapes import StepSettings
from support import peaks
from support.peaks import steps

QUICK = {"rounds": (1.0,), "iterations": 1}
LLAMA = {
    "model_type": "llama", "vocab_size": 1000, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 4,
}  # fmt: skip
MIXTRAL = {
    "model_type": "mixtral", "vocab_size": 1000, "hidden_size": 320, "intermediate_size": 640, "num_hidden_layers": 1,
    "num_attention_heads": 8, "num_key_value_heads": 4, "num_local_experts": 6, "num_experts_per_tok": 2,
}  # fmt: skip


def case(config: dict[str, Any], **more: Any) -> dict[str, Any]:
    made = {"config": config, "stored": "float32", "dtype": "float32", "batch": 4, "steps": 1}
    made |= {"calibration": {"windows": 4, "window_length": 64}, "prune": QUICK}
    return made | more


CASES = {
    "a second domain": case(LLAMA, steps=2),
    "16 bits, a second domain": case(LLAMA, stored="bfloat16", dtype="bfloat16", steps=2),
    "an accumulator as large as the model": case(LLAMA, stored="bfloat16", prune=QUICK | {"criterion": "gradient"}),
    "long windows and a way back": case(
        LLAMA | {"hidden_size": 128, "intermediate_size": 352}, batch=16, prune=QUICK | {"criterion": "loss"},
        calibration={"windows": 32, "window_length": 256},
    ),
    "many words": case(
        LLAMA | {"hidden_size": 128, "intermediate_size": 352, "vocab_size": 64000},
        prune=QUICK | {"criterion": "loss"},
    ),
    "a mixture of experts": case(MIXTRAL, stored="bfloat16", steps=2),
    "a first domain": case(LLAMA),
}  # fmt: skip


def settings_of(case: dict[str, Any]) -> StepSettings:
    return StepSettings(
        calibration=CalibrationConfig(**case["calibration"], evaluation_windows=8),
        prune=PruneConfig(**case["prune"]),
        domains=case["steps"],
        dtype=getattr(torch, case["dtype"]),
        batch=case["batch"],
    )


def estimated(case: dict[str, Any], folder: Path):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(case["config"] | {"dtype": case["stored"]}))
    return estimate_step(folder, settings_of(case))


@pytest.fixture(scope="module")
def measured() -> dict[str, int]:
    """The peak of each case; small steps warm up."""
    root = Path(__file__).parents[2]
    small = LLAMA | {"hidden_size": 64}
    first = [case(small, dtype=dtype, prune=QUICK | {"criterion": "loss"}) for dtype in ("float32", "bfloat16")]
    done = subprocess.run(
        [sys.executable, peaks.__file__],
        input=json.dumps([*first, *CASES.values()]),
        env={**os.environ, "PYTHONPATH": f"{root}:{root / 'tests'}", "MALLOC_MMAP_THRESHOLD_": "65536"},
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return dict(zip(CASES, json.loads(done.stdout)[len(first) :], strict=True))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("name", CASES)
def test_the_peak_memory_of_a_step_is_within_a_fifth_of_what_was_computed(measured, name, tmp_path):
    found = estimated(CASES[name], tmp_path / "base").memory
    print(name, found.host, measured[name], found.host / measured[name])
    assert found.device == 0
    assert found.host == pytest.approx(measured[name], rel=0.2)


# --- disk and operations: small models, and well-known ones

SMALL = LLAMA | {"hidden_size": 96, "intermediate_size": 160, "vocab_size": 256, "num_hidden_layers": 3}
EXPERTS = MIXTRAL | {"hidden_size": 96, "intermediate_size": 96, "vocab_size": 256}
TWO_ROUNDS = {"rounds": (0.8, 1.0), "iterations": 3}
SMALL_CASES = {
    "full": case(SMALL, prune=TWO_ROUNDS),
    "compact": case(SMALL, calibration={"windows": 4, "window_length": 64, "storage": "compact"}),
    "gradient": case(SMALL, prune=TWO_ROUNDS | {"criterion": "gradient"}, steps=2),
    "loss": case(SMALL, prune=TWO_ROUNDS | {"criterion": "loss"}, steps=2, batch=3),
    "16 bits": case(SMALL, prune=TWO_ROUNDS, stored="bfloat16", dtype="bfloat16"),
    "experts": case(EXPERTS, prune=TWO_ROUNDS | {"criterion": "loss"}),
}


@dataclass(frozen=True)
class Taken:
    """The last step of a case: its folder, the bytes of hidden states that it kept, what it did, and the estimate."""

    out: Path
    hidden: int
    operations: dict[torch.dtype, int]
    estimate: Estimate


@pytest.fixture(scope="module", params=SMALL_CASES)
def taken(request, tmp_path_factory) -> Taken:
    case, folder, kept = SMALL_CASES[request.param], tmp_path_factory.mktemp("case"), []

    def spy(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        kept.extend(tensor.nbytes for name, tensor in tensors.items() if name == "hidden")
        save_shard(path, tensors, metadata)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("copal.resume.save_shard", spy)
        for step in steps(case, folder):
            kept.clear()
            with Meter() as meter:
                step()
    return Taken(folder / str(1 + case["steps"]), sum(kept), meter.operations, estimated(case, folder / "config"))


def test_the_disk_that_was_computed_is_that_of_the_files_that_a_step_writes(taken):
    found, out = taken.estimate.disk, taken.out
    assert found.contribution == tensor_bytes(out / "state" / "contribution")
    assert found.total == tensor_bytes(out / "state" / "sum")
    assert found.model == tensor_bytes(out / "model")
    assert found.hidden == taken.hidden
    files = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert found.version + 200_000 > files > found.version  # headers, manifest, report


def tensor_bytes(folder: Path) -> int:
    """Of the safetensors files in a folder, without their headers."""
    files = list(folder.glob("*.safetensors"))
    assert files
    headers = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in files)
    return sum(file.stat().st_size for file in files) - headers


def test_operations_are_counted_as_a_step_does_them(taken):
    """To a thousandth: angles of rotary embeddings are computed once a batch, and are counted once a window."""
    half, single = (
        sum(getattr(part, kind) for what, part in taken.estimate.work.items() if what != "evaluation")
        for kind in ("half", "single")
    )
    if torch.bfloat16 in taken.operations:
        assert taken.operations == pytest.approx({torch.bfloat16: half, torch.float32: single}, rel=1e-3)
    else:
        assert taken.operations == pytest.approx({torch.float32: half + single}, rel=1e-3)


def test_operations_of_an_evaluation(tmp_path, cpu):
    """Of the version on both of its domains, of the dense model on the new one, and of the parent on that."""
    settings = case(SMALL, steps=2)
    for step in steps(settings, tmp_path):
        step()
    windows = {name: torch.randint(256, (8, 64)) for name in ("one", "two")}
    newest = {"two": windows["two"]}
    with Meter() as meter:
        for folder, scored in (
            (tmp_path / "3" / "model", windows),
            (tmp_path / "base", newest),
            (tmp_path / "2" / "model", newest),
        ):
            evaluate(folder, scored, device=cpu, dtype=torch.float32)
    work = estimated(settings, tmp_path / "config").work["evaluation"]
    assert meter.operations == pytest.approx({torch.float32: work.half + work.single}, rel=1e-3)


def test_the_meter_counts_what_the_counter_of_torch_counts(make_model, cpu):
    model = AutoModelForCausalLM.from_pretrained(make_model(hidden=96))
    tokens = torch.zeros(3, 32, dtype=torch.long)
    attention = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
    }
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=attention) as counter, Meter() as meter:
        model(tokens)
    assert meter.operations == {torch.float32: counter.get_total_flops()}


def test_the_meter_forgets_what_is_gone_and_counts_no_view_twice():
    there = torch.zeros(1000)
    with Meter() as meter:
        for _ in range(3):
            made = torch.zeros(500)
            made[:100].add_(1)
            there.view(10, 100).mul_(2)
    assert meter.most == 2 * 4 * 500  # the new one is made before the old one goes


@pytest.mark.parametrize(
    ("name", "parameters", "share", "gigabytes"),
    [
        ("SmolLM2-135M", 134_515_008, 0.375, 2),
        ("Llama-2-7B", 6_738_415_616, 0.408, 10),
        ("Llama-2-13B", 13_015_864_320, 0.415, 16),
        ("Llama-2-70B", 68_976_648_192, 0.594, 70),
        ("Mixtral-8x7B", 46_702_792_704, 0.621, 70),
    ],
)
def test_sizes_of_models_that_everybody_knows(name, parameters, share, gigabytes):
    """Parameters as published; a contribution is half of a 16-bit model, or a twentieth where it is compact."""
    full, compact = (estimated_of(name, storage=storage) for storage in ("full", "compact"))
    assert full.disk.model == 2 * parameters
    assert full.disk.contribution / full.disk.model == pytest.approx(share, abs=1e-3)
    assert 0.04 < compact.disk.contribution / compact.disk.model < 0.05
    assert full.memory.device < gigabytes * 1e9


def estimated_of(name: str, storage: str, criterion: str = "output") -> Estimate:
    calibration, prune = CalibrationConfig(storage=storage), PruneConfig(criterion=criterion)
    settings = StepSettings(calibration=calibration, prune=prune, domains=3, dtype=torch.bfloat16, on_gpu=True)
    with config_folder(name) as folder:
        return estimate_step(folder, settings)
