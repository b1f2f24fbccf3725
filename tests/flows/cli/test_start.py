"""`copal init`, `base`, `doctor` and `demo`: real git, DVC and MLflow."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from copal.errors import CopalError
from flows.params import load_settings
from flows.settings import Settings
from flows.start.domains import DOMAINS
from flows.start.init import default_params, model_name_for
from flows.workspace import open_workspace
from support.benches import PARAMS, Bench


def git(root, *arguments: str) -> str:
    command = ["git", "-C", str(root), "-c", "user.name=test", "-c", "user.email=test@localhost", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def tree(root) -> dict[str, bytes]:
    """Every file under `root` but what git and DVC keep for themselves."""
    files = [path for path in root.rglob("*") if path.is_file()]
    named = {path.relative_to(root).as_posix(): path for path in files}
    return {name: path.read_bytes() for name, path in named.items() if not name.startswith((".git/", ".dvc/tmp/"))}


# --- init and base


def test_init_makes_a_workspace_with_its_base(run, tiny_base, tmp_path):
    root = tmp_path / "new" / "Our Tickets"
    code, out, _ = run("init", root, "--base", tiny_base)
    assert code == 0
    assert str(root) in out
    assert git(root, "status", "--porcelain") == ""
    committed = git(root, "ls-files").splitlines()
    assert {".gitignore", ".dvc/config", "params.yaml", "data/README.md"} <= set(committed)
    assert not any(name.startswith(".copal") for name in committed)
    assert git(root, "log", "-1", "--format=%an <%ae>") == "copal <copal@localhost>"  # git knows no identity here
    code, out, _ = run("status", "--json", "--workspace", root)
    found = json.loads(out)
    assert found["model"] == "Our-Tickets"
    assert [version["version"] for version in found["versions"]] == [1]
    assert not any(open_workspace(root).runs.iterdir())

    before = tree(root)
    assert run("init", root, "--base", tiny_base)[0] == 0  # again: nothing to do
    assert run("init", root)[0] == 0
    databases = ("mlflow.db", "ledger.db")  # who looks at a registry or holds a lineage writes to them
    assert {name: content for name, content in tree(root).items() if not name.endswith(databases)} == {
        name: content for name, content in before.items() if not name.endswith(databases)
    }
    assert git(root, "rev-list", "--count", "HEAD") == "1"


def test_init_completes_a_repository_and_commits_only_its_own_files(run, tmp_path):
    git(tmp_path, "init", "--quiet")
    (tmp_path / "params.yaml").write_text("model: {name: mine}\n")
    (tmp_path / ".gitignore").write_text("*.log\n")
    (tmp_path / "staged.txt").write_text("not yet to be committed")
    git(tmp_path, "add", "staged.txt")
    assert run("init", tmp_path)[0] == 0
    assert (tmp_path / "params.yaml").read_text() == "model: {name: mine}\n"
    assert (tmp_path / ".gitignore").read_text() == "*.log\n.copal/\n"
    assert git(tmp_path, "status", "--porcelain") == "A  staged.txt"


@pytest.fixture
def bad_bases(tmp_path_factory, tiny_base):
    """Folders that are no base model: (folder, what the line says of it)."""
    empty, encoder, untokenised, pointer, huge, theirs, foreign = (
        tmp_path_factory.mktemp(name)
        for name in ("empty", "encoder", "untokenised", "pointer", "huge", "theirs", "foreign")
    )
    shutil.copytree(tiny_base, encoder, dirs_exist_ok=True)
    config = json.loads((encoder / "config.json").read_text())
    (encoder / "config.json").write_text(json.dumps(config | {"model_type": "t5", "is_encoder_decoder": True}))
    shutil.copytree(tiny_base, untokenised, dirs_exist_ok=True)
    (untokenised / "tokenizer.json").unlink()
    for folder in (pointer, huge, theirs, foreign):
        shutil.copytree(tiny_base, folder, dirs_exist_ok=True)
    (pointer / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    (huge / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**7}))
    (theirs / "config.json").write_text(json.dumps(config | {"attn_implementation": "owner/kernel"}))
    tokenizer = (foreign / "tokenizer.json").read_text().replace('"</s>": 1', '"</s>": 1000')
    (foreign / "tokenizer.json").write_text(
        tokenizer.replace('"</s>":1', '"</s>":1000').replace('"id": 1', '"id": 1000')
    )
    return [
        (empty, "config.json"),
        (encoder, "encoder-decoder"),
        (untokenised, "no tokenizer"),
        (pointer, "git lfs pull"),
        (huge, "num_hidden_layers"),
        (theirs, "attn_implementation names code of a hub"),
        (foreign, "embeddings have 258 rows"),
    ]


def test_a_bad_base_leaves_no_half_workspace(refused, bad_bases, tmp_path):
    for source, says in [*bad_bases, ("pypi:none of this", "not a package"), ("no such thing", "no such thing")]:
        assert says in refused("init", tmp_path / "new" / "deep", "--base", source)
        assert says in refused("base", source, tmp_path / "target")
        assert not any(tmp_path.iterdir())


def test_a_bad_base_leaves_an_existing_folder_as_it_was(refused, bad_bases, tmp_path):
    git(tmp_path, "init", "--quiet")
    (tmp_path / ".gitignore").write_text("*.log\n")
    git(tmp_path, "add", ".gitignore")
    before = tree(tmp_path)
    refused("init", tmp_path, "--base", bad_bases[0][0])
    assert tree(tmp_path) == before
    assert git(tmp_path, "status", "--porcelain") == "A  .gitignore"


def test_what_fails_late_leaves_an_existing_folder_as_it_was_too(refused, monkeypatch, tiny_base, tmp_path):
    git(tmp_path, "init", "--quiet")
    (tmp_path / ".gitignore").write_text("*.log\n")
    (tmp_path / "mine.txt").write_text("mine")
    git(tmp_path, "add", "mine.txt")
    before = tree(tmp_path)

    def conflict(*_):
        raise CopalError("another base under the same model name")

    monkeypatch.setattr("flows.step.register.register_root", conflict)
    assert "another base" in refused("init", tmp_path, "--base", tiny_base)
    assert tree(tmp_path) == before
    assert git(tmp_path, "status", "--porcelain").splitlines() == ["A  mine.txt", "?? .gitignore"]


def test_another_base_under_the_same_name(bench, refused, make_model, tiny_base, tmp_path):
    other = shutil.copytree(tiny_base, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    before, versions = bench.snapshot(), bench.registry.versions()
    head = git(bench.root, "status", "--porcelain")
    assert "another base" in refused("init", bench.root, "--base", other)
    assert bench.snapshot() == before
    assert bench.registry.versions() == versions
    assert git(bench.root, "status", "--porcelain") == head


def test_a_good_base_is_taken_under_the_name_for_which_a_bad_one_was_refused(
    run, refused, bad_bases, tiny_base, tmp_path
):
    for source, _ in bad_bases:
        refused("init", tmp_path / "workspace", "--base", source)
    assert run("init", tmp_path / "workspace", "--base", tiny_base)[0] == 0


def test_a_base_with_learned_positions_for_fewer_tokens_than_a_window(run, refused, tiny_base, tmp_path):
    sizes = {"vocab_size": 258, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path / "short")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny_base / name, tmp_path / "short" / name)
    root = tmp_path / "workspace"
    assert run("init", root)[0] == 0
    said = refused("init", root, "--base", tmp_path / "short")
    assert f"calibration.window_length is 512, and {tmp_path / 'short'} has learned positions for 16 tokens" in said
    params = root / "params.yaml"
    params.write_text(params.read_text().replace("window_length: 512", "window_length: 16"))
    assert run("init", root, "--base", tmp_path / "short")[0] == 0


def test_init_refuses_a_file_and_bad_settings(refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a file" in refused("init", tmp_path / "file")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "params.yaml").write_text("prune: {sparsity: 2}\n")
    assert "prune.sparsity" in refused("init", tmp_path / "bad")
    assert [path.name for path in (tmp_path / "bad").iterdir()] == ["params.yaml"]


def test_new_settings_are_the_defaults(tmp_path):
    params = tmp_path / "params.yaml"
    for name in ("copal", "2026", "true", "1e3"):  # a folder may be called what YAML reads as something else
        params.write_text(default_params(name))
        assert load_settings(params).model.name == name
    params.write_text(default_params("copal"))
    assert load_settings(params) == Settings()
    own = Path(__file__).parents[3] / "params.yaml"  # of this repository: the same text, so that neither falls behind
    assert own.read_text(encoding="utf-8").startswith(default_params("copal-demo"))
    assert model_name_for(tmp_path / "_Our (tickets)") == "Our-tickets-"
    assert model_name_for(tmp_path / "日本") == "copal"


def test_base_fetches_a_folder(run, refused, tiny_base, tmp_path):
    code, out, _ = run("base", tiny_base, tmp_path / "base")
    assert code == 0
    assert "fingerprint" in out
    assert (tmp_path / "base" / "model.safetensors").is_file()
    assert "is not an empty folder" in refused("base", tiny_base, tmp_path / "base")


# --- sizes


def test_sizes_of_a_well_known_model(run):
    code, out, err = run("sizes", "llama-2-7b", "--json", "--criterion", "loss", "--domains", "5")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["parameters"], found["blocks"]) == (6_738_415_616, 32)
    assert found["settings"]["domains"] == 5
    assert found["disk"]["model"] == 13_476_831_232
    assert found["disk"]["hidden"] == 32 * 24 * 512 * 4096 * 2
    assert found["memory"]["gpu"] < found["hardware"]["L40S"]["memory"]
    assert set(found["seconds"]) == {"this machine", "A100-80GB", "H100-80GB", "H200", "L40S"}
    assert all(set(parts) == {*found["operations"], "files"} for parts in found["seconds"].values())
    assert found["seconds"]["H100-80GB"]["solve"] < found["seconds"]["A100-80GB"]["solve"]


def test_sizes_of_a_folder_in_words(run, tiny_base):
    code, out, err = run("sizes", tiny_base)
    assert (code, err) == (0, "")
    for said in ("2 blocks", "running sum", "without a GPU", "way back", "H100-80GB", "files, at 1 GB/s"):
        assert said in out


def test_sizes_of_every_well_known_model(run):
    code, out, _ = run("sizes")
    assert code == 0
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert {"SmolLM2-135M", "Llama-2-13B", "Llama-3-70B", "Mixtral-8x7B"} < set(rows)
    assert "(0.408)" in rows["Llama-2-7B"]
    assert "(0.049)" in rows["Llama-2-7B"]


def test_sizes_of_what_is_no_model(refused, tmp_path):
    assert "'nonesuch' is no folder, and no model whose shape copal knows: SmolLM2-135M" in refused("sizes", "nonesuch")
    assert "has no config.json" in refused("sizes", tmp_path)


# --- doctor and demo


def test_doctor_says_what_is_wrong(bench, run, monkeypatch):
    from flows.cli import doctor

    assert run("doctor", "--workspace", bench.root)[0] == 0
    monkeypatch.setattr(doctor, "doctor", lambda path: [doctor.Check(name="git", ok=False, found="no", advice="do")])
    assert run("doctor", "--workspace", bench.root)[:2] == (2, "wrong git          no\n                   -> do\n")


@pytest.fixture
def small_demo(tiny_base, monkeypatch):
    """The demo with a toy for its base, made-up text for its domains, and settings that fit them."""

    def build(name: str, target: Path) -> int:
        Bench(open_workspace(target.parents[1]), tiny_base).write(name, DOMAINS.index(name))
        return 24

    monkeypatch.setattr("flows.start.demo.BASE", str(tiny_base))
    monkeypatch.setattr("flows.start.domains.build_domain", build)
    monkeypatch.setattr("flows.start.init.default_params", lambda name: PARAMS.replace("name: tiny", f"name: {name}"))


def test_demo_makes_a_version_a_domain_and_a_champion_without_a_flow(run, small_demo, monkeypatch, tmp_path):
    for flow in ("adapt", "promote", "watch"):
        monkeypatch.setitem(sys.modules, f"flows.{flow}", None)  # no flow, so no server that Prefect would start
    code, out, err = run("demo", "--workspace", tmp_path / "demo")
    assert code == 0, err
    assert "5. version 4 passed its gates; it is promoted" in out
    status = json.loads(run("status", "--json", "--workspace", tmp_path / "demo")[1])
    assert [version["domain"] for version in status["versions"]] == [None, *DOMAINS]
    assert status["versions"][-1]["aliases"] == ["challenger", "champion", "latest"]


def test_demo_refuses_a_folder_of_somebody_else(refused, tmp_path):
    (tmp_path / "mine.txt").write_text("")
    assert "was not made by" in refused("demo", "--workspace", tmp_path)
