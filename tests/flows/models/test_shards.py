"""Shards by size: what is exported loads bit for bit as the version does and is known by its bytes; nothing else is."""

from __future__ import annotations

import json
import random
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from copal.checkpoint import Checkpoint, CheckpointWriter
from copal.errors import ModelError
from copal.files import write_json
from copal.progress import silent
from flows.lineage.answers import whose
from flows.lineage.files import file_digests
from flows.lineage.history import History
from flows.models.shards import VERSION_FILES, copy_model, folder_files
from flows.models.tensor_files import read_tensor_file
from support.damage import damaged
from support.histories import altered, three_domains

INDEX = "model.safetensors.index.json"
LARGE, SMALL = 50_000_000_000, 20_000
Export = Callable[[Path, int], Path]


@pytest.fixture(scope="module")
def version(tiny_base: Path, tmp_path_factory) -> Path:
    """The model of a version, as a step writes it: a file for each block, and one for the rest."""
    folder = tmp_path_factory.mktemp("version") / "model"
    source = Checkpoint(tiny_base)
    writer = CheckpointWriter(source, folder, shards=3)
    parts: dict[str, list[str]] = {"": [], "model.layers.0.": [], "model.layers.1.": []}
    for name in source.names():
        parts[next(part for part in reversed(parts) if name.startswith(part))].append(name)
    for names in parts.values():
        writer.write(names, {})
    writer.finish()
    return folder


@pytest.fixture
def export(tmp_path: Path) -> Export:
    def call(model: Path, shard_size: int) -> Path:
        target = tmp_path / f"exported-{shard_size}"
        target.mkdir()
        copy_model(model, file_digests(model, model), target, shard_size, silent)
        return target

    return call


def history_with(model: Path) -> History:
    """A history whose version 4 has that model."""
    history = three_domains()
    record = history.versions[3].record.model_copy(update={"files": file_digests(model, model.parent)})
    return altered(history, 4, record=record)


def asked(model: Path, folder: Path) -> dict:
    return whose(history_with(model), folder_files(folder))


def logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(torch.arange(1, 33)[None]).logits


def weights(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize(("shard_size", "files"), [(LARGE, 1), (SMALL, None), (1, 20)])
def test_a_version_in_shards_by_size_loads_bit_for_bit_and_is_known(version, export, shard_size, files):
    exported = export(version, shard_size)
    assert torch.equal(logits(exported), logits(version))
    Checkpoint(exported)  # refuses an index that does not fit
    found = weights(exported)
    assert len(found) == (files or len(found)) > (shard_size == SMALL)
    assert found == ["model.safetensors"] or found[-1] == f"model-{len(found):05d}-of-{len(found):05d}.safetensors"
    for file in found:
        tensors = load_file(exported / file)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= shard_size or len(tensors) == 1
    answer = asked(version, exported)
    assert (answer["versions"], answer["form"], answer["differences"]) == ([4], "exported", [])


def test_a_shard_is_what_safetensors_itself_writes(version, tmp_path, export):
    exported = export(version, LARGE)
    save_file(load_file(exported / "model.safetensors"), tmp_path / "again", metadata={"format": "pt"})
    assert (exported / "model.safetensors").read_bytes() == (tmp_path / "again").read_bytes()


def test_numbers_of_any_width_are_aligned_also_where_there_are_none(tmp_path, export):
    model = tmp_path / "model"
    model.mkdir()
    stored = {}
    for number, dtype in enumerate((torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.int64)):
        tensors = {f"{part}.{number}": torch.arange(part).to(dtype) for part in (0, 1, 3)}
        tensors |= {f"one.{number}": torch.ones((), dtype=dtype)}
        save_file(tensors, model / f"{number}.safetensors")
        stored |= tensors
    exported = export(model, LARGE)
    found = load_file(exported / "model.safetensors")
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name].float(), tensor.float()) for name, tensor in stored.items())
    shard = read_tensor_file(exported / "model.safetensors")
    assert all(offset % stored[name].itemsize == 0 for name, offset in shard.offsets() if stored[name].numel())
    assert asked(model, exported)["versions"] == [4]


def test_a_model_that_is_in_such_shards_already_is_copied_as_it_is(tiny_base, export):
    exported = export(tiny_base, LARGE)
    assert file_digests(exported, exported) == file_digests(tiny_base, tiny_base)


def test_a_file_that_others_wrote_is_known_by_its_bytes_whatever_is_in_its_header(tiny_base, tmp_path, export):
    """Metadata, another order, names in the hub's escapes, spaces: of a base, which is version 1 as it came."""
    model = tmp_path / "model"
    shutil.copytree(tiny_base, model)
    tensors = load_file(model / "model.safetensors")
    entries, data = {}, b""
    for name in sorted(tensors, reverse=True):
        content = tensors[name].numpy().tobytes()
        entries[name] = {"data_offsets": [len(data), len(data) + len(content)], "shape": list(tensors[name].shape)}
        entries[name]["dtype"] = "F32"
        data += content
    header = json.dumps(entries | {"__metadata__": {"by": "söme öther"}}, indent=1, ensure_ascii=False).encode() + b"  "
    (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    exported = export(model, SMALL)
    assert len(weights(exported)) > 1
    assert torch.equal(logits(exported), logits(model))
    with safe_open(exported / weights(exported)[0], "pt") as shard:
        assert shard.metadata() == {"format": "pt"}
    assert asked(model, exported)["versions"] == [4]


def test_an_older_export_with_the_files_of_the_version_is_still_known(version):
    answer = asked(version, version)
    assert (answer["versions"], answer["form"]) == ([4], "exported")


# --- what is not the version


def _edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


UP = "model.layers.1.mlp.up_proj.weight"
THIRD = "changed: model-00003-of-00003.safetensors of the version, with 9 tensors of model.layers.1"
AWAY = f"{THIRD}, of which the tensor {UP} is not there as the version has it"


def _turn(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP] = tensors[UP].reshape(tensors[UP].shape[::-1])  # the same bytes


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors[UP][3, 5].add_(1), THIRD),
        (_turn, AWAY),
        (lambda tensors: tensors.pop(UP), AWAY),
        (lambda tensors: tensors.update(more=torch.ones(1)), "extra: the tensor more in the shards"),
    ],
)
def test_tensors_that_differ_are_named_by_the_files_of_the_version(version, export, change, said):
    exported = export(version, LARGE)
    _edit(exported, change)
    answer = asked(version, exported)
    assert (answer["versions"], answer["closest"], answer["form"]) == ([], 4, "exported")
    assert said in answer["differences"]


def _metadata(folder: Path) -> None:
    save_file(load_file(folder / "model-00002-of-00003.safetensors"), folder / "model-00002-of-00003.safetensors")


def _index(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "elsewhere.safetensors"
    write_json(folder / INDEX, index)


def _goes_before(folder: Path) -> None:
    """transformers loads model.safetensors where there are shards as well."""
    save_file({"model.norm.weight": torch.ones(32)}, folder / "model.safetensors", metadata={"format": "pt"})


def _longer(folder: Path) -> None:
    with (folder / "model-00002-of-00003.safetensors").open("ab") as file:
        file.write(b"more")


def _kept(folder: Path) -> None:
    kept = json.loads((folder / VERSION_FILES).read_text())
    kept["headers"]["part-1.safetensors"] += " "
    kept["index"] += " "
    write_json(folder / VERSION_FILES, kept)


def _spelt(folder: Path) -> None:
    kept = json.loads((folder / VERSION_FILES).read_text())
    (folder / VERSION_FILES).write_text(json.dumps(kept | {"more": 1}))


def _no_bytes(folder: Path) -> None:
    (folder / VERSION_FILES).write_text('{"headers": {"a": "€"}, "index": null}')


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_metadata, "changed: model-00002-of-00003.safetensors (its header)"),
        (_index, f"changed: {INDEX}"),
        (lambda folder: (folder / INDEX).unlink(), f"missing: {INDEX}"),
        (_goes_before, "extra: the tensor model.norm.weight in model.safetensors, and in another shard as well"),
        (_longer, "changed: model-00002-of-00003.safetensors (it is damaged)"),
        (lambda folder: (folder / "model-00003-of-00003.safetensors").unlink(), "are not there as the version has it"),
        (_kept, f"changed: {INDEX} of the version, kept in {VERSION_FILES}"),
        (lambda folder: (folder / VERSION_FILES).unlink(), "extra: model-00003-of-00003.safetensors"),
        (_no_bytes, f"extra: {VERSION_FILES}"),
        (_spelt, f"changed: {VERSION_FILES}"),
        (lambda folder: (folder / "pytorch_model.bin").write_text(""), "extra: pytorch_model.bin"),
    ],
)
def test_what_stands_around_the_tensors_counts_too(version, tmp_path, change, said):
    model = tmp_path / "halves" / "model"  # so that no file of the version is called like a shard
    shutil.copytree(version, model)
    for path in [*model.glob("*.safetensors"), model / INDEX]:
        path.unlink()
    tensors = Checkpoint(version).read(Checkpoint(version).names())
    halves = {f"part-{half}.safetensors": dict(sorted(tensors.items())[half::2]) for half in (0, 1)}
    for file, part in halves.items():
        save_file(part, model / file)
    write_json(model / INDEX, {"weight_map": {name: file for file, part in halves.items() for name in part}})
    exported = tmp_path / "exported"
    exported.mkdir()
    size = sum(tensor.nbytes for tensor in tensors.values())
    copy_model(model, file_digests(model, model), exported, int(size / 2.4), silent)
    assert len(weights(exported)) == 3
    assert asked(model, exported)["versions"] == [4]
    change(exported)
    answer = asked(model, exported)
    assert (answer["versions"], answer["closest"]) == ([], 4)
    assert any(difference.endswith(said) for difference in answer["differences"]), answer["differences"]


def test_no_damaged_export_is_taken_for_the_version_and_none_ends_in_a_traceback(version, export, tmp_path):
    exported = export(version, SMALL)
    history, drawn = history_with(version), random.Random(0)
    files = [path for path in exported.iterdir() if path.name not in ("config.json", "tokenizer.json")]
    for _ in range(60):
        path = drawn.choice(files)
        content = path.read_bytes()
        start = content[:400] if drawn.random() < 0.7 else content
        changed = damaged(start, drawn) + content[len(start) :]
        path.write_bytes(changed)
        assert whose(history, folder_files(exported))["versions"] == ([4] if changed == content else []), path.name
        path.write_bytes(content)
    assert whose(history, folder_files(exported))["versions"] == [4]


# --- a version's files are checked as they are read


@pytest.mark.parametrize("file", ["model-00002-of-00003.safetensors", INDEX, "config.json"])
@pytest.mark.parametrize("place", [4, 30, -1])
def test_a_damaged_file_of_the_version_is_refused(version, tmp_path, file, place):
    model, target = tmp_path / "model", tmp_path / "target"
    shutil.copytree(version, model)
    target.mkdir()
    digests = file_digests(model, model)
    content = bytearray((model / file).read_bytes())
    content[place] ^= 1
    (model / file).write_bytes(content)
    with pytest.raises(ModelError, match=f"{file} is damaged"):
        copy_model(model, digests, target, LARGE, silent)
    (model / file).unlink()
    with pytest.raises(ModelError, match=f"{file} is missing"):
        copy_model(model, digests, target, LARGE, silent)


def test_all_that_is_read_is_told_and_no_more_than_a_piece_is_held(tmp_path, export):
    model = tmp_path / "model"
    model.mkdir()
    for number in range(2):
        tensors = {f"{number}.{name}": torch.full((24, 1 << 20), number, dtype=torch.uint8) for name in "ab"}
        save_file(tensors, model / f"{number}.safetensors")
    digests, told, target = file_digests(model, model), [], tmp_path / "exported"
    target.mkdir()
    tracemalloc.start()
    copy_model(model, digests, target, 60 << 20, lambda *heard: told.append(heard))
    folder_files(target)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(weights(target)) == 2
    assert peak < 36 << 20  # one is being read while the last one is still there
    assert told[-1] == ("copy", told[-1][2], told[-1][2])
    assert told[-1][2] == sum(path.stat().st_size for path in model.iterdir())
