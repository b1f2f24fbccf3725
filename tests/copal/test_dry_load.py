"""A base model is checked once, whole, before anything is made of it: configuration, tokenizer and weights."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from copal.base import base_fingerprint
from copal.checkpoint import Checkpoint
from copal.dry_load import check_finite, dry_load
from copal.errors import ModelError, SettingsError
from copal.evaluation import evaluate
from copal.generate import continue_greedily
from support.architectures import ARCHITECTURES, random_model

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
Edit = Callable[[Path], object]


@pytest.fixture
def copy(tiny_base: Path, tmp_path: Path) -> Path:
    """One to break."""
    return Path(shutil.copytree(tiny_base, tmp_path / "copy"))


def config(**changes: Any) -> Edit:
    return lambda folder: edit_json(folder / "config.json", **changes)


def tokenizer_config(**changes: Any) -> Edit:
    return lambda folder: edit_json(folder / "tokenizer_config.json", **changes)


def file(name: str, text: str | bytes) -> Edit:
    return lambda folder: (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Edit:
    def edit(folder: Path) -> None:
        stored = load_file(folder / "model.safetensors")
        change(stored)
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def tokens(*added: str) -> Edit:
    def edit(folder: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens(list(added))
        tokenizer.save_pretrained(folder)

    return edit


def slow_tokenizer(vocabulary: str, merges: str = "#version: 0.2\nb c\n") -> Edit:
    """GPT-2's files in the place of tokenizer.json."""

    def edit(folder: Path) -> None:
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.json").write_text(vocabulary)
        (folder / "merges.txt").write_text(merges)
        edit_json(folder / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")

    return edit


def sentencepiece_only(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    edit_json(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")


CHARSMAP = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
LAST = "model.layers.1.mlp.down_proj.weight"
REFUSED: dict[str, tuple[Edit, str]] = {
    # tokenizers
    "pointer of Git LFS": (file("tokenizer.json", POINTER), "tokenizer.json is a pointer of Git LFS"),
    "weights that are a pointer": (file("model.safetensors", POINTER), "model.safetensors is a pointer of Git LFS"),
    "class that is no text": (tokenizer_config(tokenizer_class=5), "tokenizer_class is 5"),
    "class that is no tokenizer": (tokenizer_config(tokenizer_class="pipeline"), "'pipeline', which is no tokenizer"),
    "class of a model": (tokenizer_config(tokenizer_class="AutoModelForCausalLM"), "which is no tokenizer"),
    "class in config.json": (config(tokenizer_class="AutoTokenizer"), "which is no tokenizer"),
    "broken vocab.json": (slow_tokenizer('{"a": 0,'), "cannot be loaded"),
    "vocab.json that is a list": (slow_tokenizer("[1]"), "cannot be loaded"),
    "broken merges.txt": (slow_tokenizer('{"a": 0}', "b\n\n"), "cannot be loaded"),
    "tokenizer.json that is a list": (file("tokenizer.json", "[]"), "cannot be loaded"),
    "tokenizer.json nested deep": (file("tokenizer.json", "[" * 100_000 + "]" * 100_000), "cannot be loaded"),
    "tokenizer.json over which Rust panics": (
        lambda folder: edit_json(folder / "tokenizer.json", normalizer=CHARSMAP),
        "Cannot parse precompiled_charsmap",
    ),
    "added token": (tokens("lessee"), "token 'lessee' with id 258, and the model's embeddings have 258 rows"),
    "special token": (tokenizer_config(bos_token="<new>"), "token '<new>' with id 258"),
    "special token of another type": (tokenizer_config(bos_token=5), "cannot be loaded"),
    "token with unknown keys": (tokenizer_config(bos_token={"content": "<s>", "\x1b[2J": 1}), r"has: '\x1b[2J'"),
    "template that is no text": (file("chat_template.jinja", b"\xff"), "cannot be loaded"),
    # config.json against the weights
    "missing tensor": (weights(lambda stored: stored.pop(LAST)), f"lack what its config.json asks for: {LAST}"),
    "surplus tensor": (
        weights(lambda stored: stored.update(x=torch.ones(2))),
        "hold what its config.json has no place for",
    ),
    "fewer layers than stored": (config(num_hidden_layers=1), "has no place for: model.layers.1."),
    "wrong shape": (config(intermediate_size=96), "config.json wants (32, 96)"),
    "int8": (weights(lambda s: s.update({LAST: s[LAST].to(torch.int8)})), f"{LAST} is stored as I8"),
    "float8": (weights(lambda s: s.update({LAST: s[LAST].to(torch.float8_e4m3fn)})), "as F8_E4M3, and copal prunes"),
    "two for one place": (
        weights(lambda s: s.update({"layers.0.mlp.up_proj.weight": s["model.layers.0.mlp.up_proj.weight"].clone()})),
        "holds two tensors for one place",
    ),
    "name with escapes": (weights(lambda s: s.update({"\x1b[2J": torch.ones(2)})), r"no model has: '\x1b[2J'"),
    "unknown rope type": (config(rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}), "spiral"),
    "architectures": (config(architectures=5), "architectures is no list of texts"),
    "architectures of numbers": (config(architectures=[5]), "architectures is no list of texts"),
    "model_type": (config(model_type=["llama"]), "model_type is no text"),
    "text for a number": (config(hidden_size="32"), "hidden_size"),
    "object for a number": (config(num_attention_heads={}), "num_attention_heads"),
    "no heads": (config(num_attention_heads=0), "no causal language model|not a causal language model"),
    "unknown activation": (config(hidden_act="reluu"), "reluu"),
    "unknown dtype": (config(dtype="float7"), "float7"),
    "no layers": (config(num_hidden_layers=0), "hold what its config.json has no place for"),
    "nested deep": (file("config.json", '{"a":' * 100_000 + "1" + "}" * 100_000), "config.json is nested too deep"),
    "an adapter": (file("adapter_config.json", "{}"), "holds an adapter"),
    "generation_config.json": (file("generation_config.json", "[]"), "generation_config.json is not a JSON object"),
}
HUGE = {
    "num_hidden_layers": 10**7,
    "hidden_size": 2**40,
    "intermediate_size": 2**40,
    "num_attention_heads": 2**40,
    "num_key_value_heads": 2**40,
    "head_dim": 2**40,
    "vocab_size": 2**40,
    "num_labels": 10**9,
    "max_position_embeddings": 2**63,
    "anything_else": [[10**12]],
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_no_step_could_use_is_refused_in_one_line(what, copy, capfd):
    edit, says = REFUSED[what]
    edit(copy)
    with pytest.raises(ModelError) as caught:
        dry_load(copy)
    assert any(word in str(caught.value) for word in says.split("|"))
    assert str(copy) in str(caught.value)
    assert str(caught.value).isprintable()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("key", HUGE)
def test_sizes_that_no_model_has_are_refused_from_the_configuration_alone(key, copy):
    edit_json(copy / "config.json", **{key: HUGE[key]})
    tracemalloc.start()
    try:
        with pytest.raises(ModelError, match=key):
            dry_load(copy)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


def test_experts_and_layers_beyond_those_stored_end_the_dry_load_while_it_builds_them(tmp_path):
    random_model("qwen3_moe").save_pretrained(tmp_path)
    for changes in ({"num_local_experts": 10**6}, {"num_hidden_layers": 1000}):
        edit_json(tmp_path / "config.json", **changes)
        with pytest.raises(ModelError, match="far more layers or experts than the weights hold"):
            dry_load(tmp_path)


VALID: dict[str, Edit] = {
    "as it is": lambda folder: None,
    "no beginning and no end": file("tokenizer_config.json", '{"tokenizer_class": "PreTrainedTokenizerFast"}'),
    "no settings of the tokenizer": lambda folder: (folder / "tokenizer_config.json").unlink(),
    "a tokenizer's class that nobody knows": tokenizer_config(tokenizer_class="NoSuchTokenizer"),
    "GPT-2's tokenizer": slow_tokenizer('{"a": 0, "b": 1, "c": 2, "bc": 3, "<s>": 4, "</s>": 5}'),
    "a chat template that cannot be rendered": file("chat_template.jinja", "{% for %}{{ 1 / 0 }}"),
    "tables of old checkpoints": weights(
        lambda stored: stored.update(
            {
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
                "model.layers.0.self_attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool),
                "model.layers.0.self_attn.masked_bias": torch.tensor(-1e4),
            }
        )
    ),
    "leftovers of another machine": tokenizer_config(
        tokenizer_file="/root/tokenizer.json", special_tokens_map_file="/etc/hostname", name_or_path="/home/me"
    ),
    "keys that nobody knows": config(my_own={"note": 1}, _attn_implementation_autoset=True),
    "attention by transformers": config(attn_implementation="eager"),
    "no attention named": config(attn_implementation=None, auto_map={}, quantization_config=None),
    "float64": weights(lambda stored: stored.update({LAST: stored[LAST].double()})),
}


@pytest.mark.parametrize("what", VALID)
def test_what_is_valid_is_accepted(what, copy, capfd):
    VALID[what](copy)
    found = dry_load(copy)
    check_finite(copy, found.tensors)
    assert found.longest_window is None
    assert set(found.tensors) <= set(Checkpoint(copy).names())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", [kind for kind in ARCHITECTURES if kind != "unheard_of"])
def test_every_architecture_of_the_contract_is_accepted(kind, tiny_base, tmp_path):
    random_model(kind, vocab_size=264).save_pretrained(tmp_path, max_shard_size="20KB")  # rows for tokens of its own
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny_base / name, tmp_path / name)
    found = dry_load(tmp_path)
    check_finite(tmp_path, found.tensors)
    assert set(found.tensors) == set(Checkpoint(tmp_path).names())
    assert found.longest_window == (64 if kind in ("gpt2", "opt") else None)


def test_a_tokenizer_that_needs_sentencepiece_says_so(copy, monkeypatch):
    monkeypatch.setattr("transformers.utils.is_sentencepiece_available", lambda: False)
    sentencepiece_only(copy)
    with pytest.raises(ModelError, match=r"tokenizer\.model needs the library sentencepiece: pip install"):
        dry_load(copy)


def test_a_tokenizers_setting_that_names_a_file_elsewhere_is_refused(copy, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    (copy / "tokenizer.json").unlink()
    (copy / "vocab.txt").write_text("a\n")
    edit_json(copy / "tokenizer_config.json", merges_file=str(tmp_path / "secret.txt"))
    with pytest.raises(ModelError, match=r"merges_file names a file outside"):
        dry_load(copy)


# --- weights


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_not_finite_are_named_with_their_file(value, dtype, copy):
    model = AutoModelForCausalLM.from_pretrained(copy, dtype=dtype)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[-1, -1] = value
    (copy / "model.safetensors").unlink()
    model.save_pretrained(copy, max_shard_size="20KB")
    with pytest.raises(ModelError, match=rf"model-0.*safetensors: the tensor {LAST} holds NaN or infinity"):
        check_finite(copy, dry_load(copy).tensors)


def test_a_tensor_is_read_in_pieces_that_make_it_up(copy):
    checkpoint = Checkpoint(copy)
    for name, whole in checkpoint.read(checkpoint.names()).items():
        pieces = list(checkpoint.read_rows(name, 1024))
        assert torch.equal(torch.cat(pieces), whole)
        assert max(piece.nbytes for piece in pieces) <= 1024
    assert len(list(checkpoint.read_rows("model.embed_tokens.weight", 1024))) > 10


def test_an_index_that_says_otherwise_than_its_shards_is_refused(copy):
    AutoModelForCausalLM.from_pretrained(copy).save_pretrained(copy, max_shard_size="20KB")
    (copy / "model.safetensors").unlink()
    index = copy / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    first, *_, last = sorted(set(good["weight_map"].values()))

    def refused(placed: dict[str, str], says: str) -> None:
        index.write_text(json.dumps(good | {"weight_map": placed}))
        with pytest.raises(ModelError, match=says):
            Checkpoint(copy)

    refused(good["weight_map"] | {"model.more": first}, "names the tensor 'model.more', which is not in")
    refused({k: v for k, v in good["weight_map"].items() if k != LAST}, f"does not name the tensor {LAST}")
    elsewhere = first if good["weight_map"][LAST] == last else last
    refused(good["weight_map"] | {LAST: elsewhere}, f"names the tensor '{LAST}', which is not in '{elsewhere}'")
    save_file({LAST: torch.ones(2)}, copy / "model-00099-of-00099.safetensors")
    refused(good["weight_map"] | {"x": "model-00099-of-00099.safetensors"}, f"holds {LAST} twice")


# --- positions


@pytest.fixture
def short(tmp_path: Path, tiny_base: Path) -> Path:
    """A GPT-2 with learned positions for 16 tokens."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 258, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=1)).save_pretrained(tmp_path / "short")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny_base / name, tmp_path / "short" / name)
    return tmp_path / "short"


def test_windows_longer_than_learned_positions_are_refused_and_shorter_ones_are_not(short, make_windows, cpu):
    assert dry_load(short).longest_window == 16
    with pytest.raises(SettingsError, match=r"fewer than 17 tokens .* lower calibration\.window_length"):
        evaluate(short, {"a": make_windows(0, length=17)}, device=cpu, dtype=torch.float32)
    evaluate(short, {"a": make_windows(0, length=16)}, device=cpu, dtype=torch.float32)


def test_a_model_with_few_positions_writes_on_all_the_same(short, make_windows):
    written = continue_greedily(short, {"a": make_windows(0, length=16)[0]}, tokens=20, dtype=torch.float32)["a"]
    assert written.finite
    assert len(written.tokens) == 20


def test_a_token_without_a_row_is_named_where_an_older_copal_let_it_in(make_model, make_windows, cpu):
    windows = make_windows(0)
    windows[1, 3] = 128
    with pytest.raises(ModelError, match="token 128 is wanted, and the model's embeddings have 128 rows"):
        evaluate(make_model(), {"a": windows}, device=cpu, dtype=torch.float32)


def test_the_fingerprint_of_a_good_base_is_what_it_was(tmp_path):
    """Workspaces know their base by it."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "merges.txt", "generation_config.json"):
        (tmp_path / name).write_text('{"a": 1}')
    save_file({"x": torch.arange(3.0)}, tmp_path / "model.safetensors")
    expected = "18cdc4ef6eed167e11483ab1c2c99b49a63975a364acc63b746fce715ff3b060"
    assert base_fingerprint(tmp_path) == expected
