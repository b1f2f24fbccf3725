"""What others wrote: bounded when it is read, and none of it runs or has anything fetched."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from copal.errors import ModelError
from copal.foreign import one_line, plainly, read_object, refuse_keys
from support import hostile_model


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deep"),
        (b'{"a":' + b"[" * 65 + b"]" * 65 + b"}", "nested too deep"),
        (b'{"a": "' + b"x" * (32 << 20) + b'"}', "larger than 32 MB"),
        (b"[1]", "not a JSON object"),
        (b"{", "not JSON"),
        (b'{"a": NaN}', "not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"\xff", "not JSON"),
        (b"", "not JSON"),
        (b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_json_is_read_within_bounds(data: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(ModelError, match=says) as caught:
        read_object(tmp_path / "config.json")
    assert str(tmp_path / "config.json") in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_what_configurations_of_the_hub_hold_is_read(tmp_path: Path) -> None:
    value = {"a": [[1, None], {"b": 1e-5}], "time_step_limit": [0.0, float("inf")]}
    (tmp_path / "config.json").write_text(json.dumps(value))
    assert read_object(tmp_path / "config.json") == value


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("config.json", "auto_map", {"AutoModelForCausalLM": "modeling_x.X"}),
        ("config.json", "custom_pipelines", {"text-generation": {"impl": "x.X"}}),
        ("config.json", "attn_implementation", "kernels-community/flash-attn3"),
        ("config.json", "attn_implementation", {"": "eager", "text_config": "owner/kernel@main:name"}),
        ("config.json", "_attn_implementation", "owner/kernel"),
        ("config.json", "_attn_implementation_internal", "paged|owner/kernel"),
        ("config.json", "attn_implementation", "flash_attention_2"),
        ("config.json", "experts_implementation", "sonicmoe"),
        ("config.json", "use_pretrained_backbone", True),
        ("config.json", "attribute_map", {"note": "_attn_implementation_internal"}),
        ("config.json", "configuration_files", ["config.5.0.0.json"]),
        ("config.json", "transformers_weights", "other.safetensors"),
        ("config.json", "fusion_config", {"x": True}),
        ("config.json", "quantization_config", {"quant_method": "gptq"}),
        ("config.json", "compression_config", {"format": "x"}),
        ("tokenizer_config.json", "auto_map", {"AutoTokenizer": ["x.X", None]}),
        ("tokenizer_config.json", "auto_map", ["x.X", None]),
        ("tokenizer_config.json", "fast_tokenizer_files", ["tokenizer.5.0.0.json"]),
        ("tokenizer_config.json", "gguf_file", "x.gguf"),
        ("tokenizer_config.json", "init_inputs", [1]),
    ],
)
def test_keys_that_fetch_or_import_are_refused_at_any_depth(file: str, key: str, value: Any) -> None:
    for held in ({key: value}, {"text_config": {key: value}}, {"parts": [{"a": {key: value}}]}):
        with pytest.raises(ModelError, match=rf"^{file}: {key} \w+.*; \w+"):
            refuse_keys(Path(file), held)


def test_keys_with_values_that_do_nothing_pass() -> None:
    nothing: dict[str, Any] = {"auto_map": {}, "quantization_config": None, "use_pretrained_backbone": False}
    refuse_keys(Path("config.json"), {**nothing, "attn_implementation": {"": "sdpa", "text_config": None}})
    refuse_keys(Path("config.json"), {"experts_implementation": "grouped_mm", "_attn_implementation_autoset": True})
    refuse_keys(Path("tokenizer_config.json"), {"init_inputs": [], "fast_tokenizer_files": None})


def test_what_a_library_says_is_one_line_for_a_terminal() -> None:
    assert one_line(ValueError("a\nb\x1b[2J c")) == "a b\\x1b[2J c"
    assert one_line(KeyError("x")) == "KeyError: 'x'"
    assert one_line(MemoryError()) == "MemoryError"
    assert len(one_line(ValueError("x" * 10_000))) < 400
    with pytest.raises(ModelError, match=r"^it cannot: RecursionError"), plainly("it cannot"):
        raise RecursionError
    with pytest.raises(KeyboardInterrupt), plainly("it cannot"):
        raise KeyboardInterrupt


def test_nothing_of_theirs_runs_and_no_hub_is_asked(tiny_base: Path, tmp_path: Path) -> None:
    """In a process of its own, which Python tells of every import, connection, program and unpickled class."""
    shutil.copytree(tiny_base, tmp_path / "base")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_HUB_OFFLINE")}
    done = subprocess.run(
        [sys.executable, hostile_model.__file__, str(tmp_path / "base")],
        env={**environment, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["suspicious"] == []
    assert found["refused"] == found["tried"] > 10
    assert found["used"] == found["tried"] + 1
    assert not list(tmp_path.rglob("RAN"))
